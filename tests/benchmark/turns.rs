//! The order of a run, over subjects that measure nothing.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use kaa::benchmark::{
    Block, CpuPart, Event, Facts, Figure, Missed, Report, Role, Subject, Suite, Workload,
};
use serde_json::json;

type Log = Arc<Mutex<Vec<(String, Workload)>>>;

/// What a subject does instead of measuring.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    Count,
    Fail(Workload),
    Hang(Workload),
    NotStart,
    HangAtOnce,
    /// Gives this for a sample.
    Give(f64),
    GiveNothing,
    Panic,
    NotEnd,
}

/// Says in each block how many it has had before, and notes that it was its turn.
struct Player {
    name: &'static str,
    does: Does,
    blocks: f64,
    log: Log,
}

#[async_trait]
impl Subject for Player {
    fn name(&self) -> &str {
        self.name
    }

    async fn describe(&mut self) -> Result<Facts, Missed> {
        match self.does {
            Does::NotStart => Err(Missed::because("there is | no\nengine")),
            Does::HangAtOnce => std::future::pending().await,
            _ => Ok(Facts::new("a game", "3.0", true)),
        }
    }

    async fn measure(&mut self, workload: Workload, block: &Block) -> Result<Vec<f64>, Missed> {
        self.log.lock().unwrap().push((self.name.to_owned(), workload));
        assert!(block.samples > 0);
        self.blocks += 1.0;
        match self.does {
            Does::Fail(failing) if failing == workload => Err(Missed::because("it can't")),
            Does::Hang(hanging) if hanging == workload => std::future::pending().await,
            Does::Give(sample) => Ok(vec![1.0, sample]),
            Does::GiveNothing => Ok(Vec::new()),
            Does::Panic => panic!("a subject of somebody's"),
            _ => Ok(vec![self.blocks]),
        }
    }

    async fn close(&mut self) {
        if self.does == Does::NotEnd {
            std::future::pending().await
        }
    }
}

fn player(name: &'static str, does: Does, log: &Log) -> Player {
    Player { name, does, blocks: 0.0, log: Arc::clone(log) }
}

const CELL: Workload = Workload::Cell;
const SESSION: Workload = Workload::Session;

#[tokio::test]
async fn everybody_has_a_turn_before_anybody_has_another_and_another_one_begins_in_each_lap() {
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("a", Does::Count, &log))
        .subject(player("b", Does::Count, &log))
        .workloads([CELL, SESSION, Workload::Memory])
        .laps(2);
    let report = suite.run(&|_| {}).await;
    let turns: Vec<String> =
        log.lock().unwrap().iter().map(|(name, workload)| format!("{name} {workload}")).collect();
    let expected = [
        ["a session", "b session", "a cell", "b cell"].as_slice(),
        &["b session", "a session", "b cell", "a cell"],
        &["a session", "b session", "a cell", "b cell", "a memory", "b memory"],
    ];
    assert_eq!(turns, expected.concat());
    // The first lap, with the blocks 1 and 2 of each, doesn't count.
    assert_eq!(report.figure("a", SESSION), Figure::of(&[3.0, 5.0]));
    assert_eq!(report.figure("b", CELL), Figure::of(&[4.0, 6.0]));
    assert_eq!(report.figure("b", Workload::Memory), Figure::of(&[7.0]));
}

#[tokio::test(start_paused = true)]
async fn who_fails_or_hangs_at_one_thing_is_asked_for_the_others() {
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("well", Does::Count, &log))
        .subject(player("fails", Does::Fail(CELL), &log))
        .subject(player("hangs", Does::Hang(CELL), &log))
        .subject(player("absent", Does::NotStart, &log))
        .subject(player("stuck", Does::HangAtOnce, &log))
        .absent(Role::Isolation, "elsewhere", "it costs money")
        .workloads([CELL, SESSION])
        .laps(3);
    let report = suite.run(&|_| {}).await;
    let samples = |name: &str, workload| report.figure(name, workload).map(|f| f.samples);
    for (name, cells) in [("well", Some(3)), ("fails", None), ("hangs", None)] {
        assert_eq!((samples(name, CELL), samples(name, SESSION)), (cells, Some(3)), "{name}");
    }
    let asked = |name: &str| {
        log.lock().unwrap().iter().filter(|(who, w)| who == name && *w == CELL).count()
    };
    assert_eq!((asked("well"), asked("fails"), asked("hangs")), (4, 1, 1));
    let markdown = report.markdown();
    for line in [
        "| `absent` | not measured: there is \\| no engine | – | – |",
        "| `stuck` | not measured: it took longer than 3 min | – | – |",
        "| `elsewhere` | not measured: it costs money | – | – |",
        "- `fails` at `cell`: it can't",
        "- `hangs` at `cell`: it took longer than 3 min",
        "| median (10th–90th percentile; of few samples all) | `well` | `fails` | `hangs` |",
    ] {
        assert!(markdown.lines().any(|found| found == line), "{line}\n{markdown}");
    }
    let svg = report.plot().unwrap();
    assert!(svg.contains(">\nfails\n") && !svg.contains("absent"), "{svg}");
}

#[tokio::test(start_paused = true)]
async fn whatever_a_subject_does_the_others_are_measured() {
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("well", Does::Count, &log))
        .subject(player("nan", Does::Give(f64::NAN), &log))
        .subject(player("negative", Does::Give(-1.0), &log))
        .subject(player("nothing", Does::GiveNothing, &log))
        .subject(player("panics", Does::Panic, &log))
        .subject(player("stays", Does::NotEnd, &log))
        .workloads([CELL])
        .laps(2);
    let report = suite.run(&|_| {}).await;
    for name in ["well", "stays"] {
        assert_eq!(report.figure(name, CELL).map(|figure| figure.samples), Some(2), "{name}");
    }
    for (name, reason) in [
        ("nan", "it gave NaN for a sample"),
        ("negative", "it gave -1 for a sample"),
        ("nothing", "it gave no sample"),
        ("panics", "it panicked"),
    ] {
        let cell = report.cells.iter().find(|cell| cell.subject == name).unwrap();
        assert_eq!((cell.figure, cell.missed.as_deref()), (None, Some(reason)));
    }
}

#[tokio::test]
async fn two_of_one_name_are_told_apart() {
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("a", Does::Give(5.0), &log))
        .subject(player("a", Does::Give(7.0), &log))
        .metering(player("a", Does::Count, &log))
        .workloads([CELL])
        .laps(1);
    let report = suite.run(&|_| {}).await;
    let names: Vec<&str> = report.subjects.iter().map(|subject| &*subject.name).collect();
    assert_eq!(names, ["a", "a (2)", "a (3)"]);
    assert_eq!(report.figure("a", CELL).unwrap().most, 5.0);
    assert_eq!(report.figure("a (2)", CELL).unwrap().most, 7.0);
}

#[tokio::test]
async fn reports_of_strangers_are_checked() {
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("a|b <!-- x --> \u{1b}[2J", Does::Count, &log))
        .workloads([CELL])
        .laps(1);
    let report = suite.run(&|_| {}).await;
    let markdown = report.markdown();
    assert!(markdown.contains("| `a\\|b &lt;!-- x -->  [2J` |"), "{markdown}");
    assert!(!markdown.contains('\u{1b}') && !report.plot().unwrap().contains('\u{1b}'));
    let good: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
    assert!(Report::from_json(&good.to_string()).is_ok());
    for (pointer, value) in [
        ("/format", json!(2)),
        ("/unix_seconds", json!(253_402_300_800_u64)),
        ("/subjects", json!(vec![&good["subjects"][0]; 2])),
        ("/workloads", json!(["cell", "cell"])),
        ("/workloads", json!(["lunch"])),
        ("/cells", json!(vec![&good["cells"][0]; 30])),
        ("/cells/0/figure/p10", json!(-1.0)),
        ("/cells/0/figure/median", json!(1e300)),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let error = Report::from_json(&bad.to_string()).expect_err(pointer).to_string();
        assert!(error.starts_with("the report can't be used: "), "{pointer}: {error}");
    }
}

#[tokio::test]
async fn ways_of_metering_are_timed_at_what_computes_and_have_a_table_of_their_own() {
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("wasm", Does::Count, &log))
        .metering(player("none", Does::Count, &log))
        .metering(player("fuel", Does::Fail(Workload::Cpu(CpuPart::Sort)), &log))
        .workloads([CELL])
        .laps(1);
    let report = suite.run(&|_| {}).await;
    let log = log.lock().unwrap();
    assert!(log.iter().all(|(name, workload)| (name == "wasm") == (*workload == CELL)), "{log:?}");
    assert_eq!(report.subjects[1].role, Role::Metering);
    let markdown = report.markdown();
    assert!(
        markdown.contains("| what metering costs, to `none` | `none` | `fuel` |"),
        "{markdown}"
    );
    // The second lap is of the blocks 9 to 16, but the failed sort was not asked for again.
    assert!(markdown.contains("| CPU: recursion | 1.00 × | 1.00 × |"), "{markdown}");
    assert!(markdown.contains("| CPU: sort | 1.00 × | – |"), "{markdown}");
}

#[tokio::test]
async fn progress_is_told_and_never_more_than_there_is() {
    let seen = Mutex::new(Vec::new());
    let log = Log::default();
    let suite = Suite::default()
        .subject(player("a", Does::Count, &log))
        .subject(player("b", Does::Fail(SESSION), &log))
        .workloads([CELL, SESSION])
        .laps(2);
    suite.run(&|event| seen.lock().unwrap().push(event)).await;
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen[0], Event::Describe { subject: "a".into() });
    let places: Vec<(usize, usize)> = seen
        .iter()
        .filter_map(|event| match event {
            Event::Measure { done, all, .. } => Some((*done, *all)),
            _ => None,
        })
        .collect();
    // One of twelve blocks fails, and two after it are not taken.
    assert_eq!(places, (0..10).map(|done| (done, 12)).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_report_of_nothing_is_no_picture() {
    let report = Suite::default().workloads([CELL]).run(&|_| {}).await;
    let error = report.plot().unwrap_err().to_string();
    assert!(error.contains("no figure that could be drawn"), "{error}");
}
