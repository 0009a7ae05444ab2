//! The order of a run, over subjects that measure nothing.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kaa::benchmark::{
    Block, CpuPart, Event, Facts, Figure, Missed, Role, Subject, Suite, Workload,
};

type Log = Arc<Mutex<Vec<(String, Workload)>>>;

/// What a subject does instead of measuring.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    Count,
    Fail(Workload),
    Hang(Workload),
    NotStart,
    HangAtOnce,
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
            _ => Ok(vec![self.blocks]),
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
        .absent("elsewhere", "it costs money")
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
        "| median (10th–90th percentile) | `well` | `fails` | `hangs` |",
    ] {
        assert!(markdown.lines().any(|found| found == line), "{line}\n{markdown}");
    }
    let svg = report.plot().unwrap();
    assert!(svg.contains(">\nfails\n") && !svg.contains("absent"), "{svg}");
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
    assert!(!markdown.contains("| CPU: sort | 14"), "{markdown}");
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

#[tokio::test(start_paused = true)]
async fn a_report_of_nothing_is_no_picture() {
    let report = Suite::default().workloads([CELL]).run(&|_| {}).await;
    let error = report.plot().unwrap_err().to_string();
    assert!(error.contains("no figure that could be drawn"), "{error}");
    tokio::time::sleep(Duration::from_millis(1)).await;
}
