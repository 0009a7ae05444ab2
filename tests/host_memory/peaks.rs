//! The most that the host's heap holds while a guest does something large.
//!
//! The allocator counts old and new room of a list that grows as both there, which is the worst case.

use std::sync::Arc;

use kaa::lm::ScriptedHandler;
use kaa::{Environment, EnvironmentExt, EnvironmentOptions, Limits};
use libtest_mimic::Failed;

use crate::HEAP;
use crate::actions::End::{self, Breaks, Completes, Raises};
use crate::actions::Host;
use crate::common::open;
use crate::held;

/// What any cell or call may take: what is cut in the guest is below it.
const SMALL: u64 = 1 << 20;
/// What is large, in bytes.
const LARGE: u64 = 40_000_000;
const OUTPUT_BYTES: u64 = 1 << 20;
const DISK_BYTES: u64 = 192 << 20;
/// Limits of `src/protocol.rs`, `src/agent.rs` and `src/wasm/wasi.rs`.
const PARSED_BYTES_MAX: u64 = 256 << 20;
const CALL_BYTES_KEPT_MAX: u64 = 256 << 20;
const ANSWER_BYTES_MAX: u64 = 64 << 20;
const FILE_BYTES_MAX: u64 = 64 << 20;

/// What a guest does, or is asked for. `large` is a text of [`LARGE`] characters.
enum Work {
    Cell(End, &'static str),
    /// `list_variables`, after this cell.
    Variables(&'static str),
    /// `get_variable("it")`, after this cell.
    Variable(&'static str),
}
use Work::{Cell, Variable, Variables};

/// Many, of long names and values.
const VARIABLES: &str =
    "globals().update({'n' * 5000 + str(n): large[:100_000] for n in range(1100)})";

pub(crate) struct Peak {
    pub(crate) name: &'static str,
    work: Work,
    bytes_max: u64,
}

const fn peak(name: &'static str, work: Work, bytes_max: u64) -> Peak {
    Peak { name, work, bytes_max }
}

pub(crate) const PEAKS: &[Peak] = &[
    peak("nothing", Cell(Completes, "1"), 32 << 10),
    // Lists that grow to the cap by doubling.
    peak(
        "a gigabyte of output",
        Cell(Completes, "import sys\nfor _ in range(25): sys.stderr.write(large)"),
        3 * OUTPUT_BYTES + SMALL,
    ),
    peak(
        "a gigabyte of lines",
        Cell(Completes, "s = large[:1_000_000]\nfor _ in range(1000): print(s)"),
        3 * OUTPUT_BYTES + SMALL,
    ),
    peak(
        "a gigabyte without the agent",
        Cell(Completes, "import os\nb = large.encode()\nfor _ in range(25): os.write(1, b)"),
        3 * OUTPUT_BYTES + SMALL,
    ),
    peak("a value", Cell(Completes, "[large] * 10"), SMALL),
    peak("a message", Cell(Raises("ValueError"), "raise ValueError(large)"), SMALL),
    peak("a type", Cell(Raises("x"), "raise type(large, (Exception,), {})(large)"), SMALL),
    peak(
        "causes",
        Cell(
            Raises("ValueError"),
            "e = None\nfor n in range(1000):\n    new = ValueError(large); new.__cause__ = e; e = new\nraise e",
        ),
        SMALL,
    ),
    peak(
        "notes",
        Cell(Raises("ValueError"), "e = ValueError(1); e.__notes__ = [large] * 5\nraise e"),
        SMALL,
    ),
    peak("a prompt", Cell(Completes, "assert llm_query(large) == 'ok'"), LARGE + SMALL),
    peak("a prompt beyond the limit", Cell(Breaks, "llm_query(large * 7)"), SMALL),
    // As it came, and what was made of it.
    peak(
        "a batch",
        Cell(Completes, "assert llm_query_batched([large[:1_000_000]] * 40) == ['ok'] * 40"),
        2 * LARGE + SMALL,
    ),
    peak(
        "prompts of a cell",
        Cell(
            Completes,
            "s = large[:20_000_000]\nfor _ in range(20): r = llm_query(s)\nassert r[:5] == 'Error', r",
        ),
        CALL_BYTES_KEPT_MAX + 20_000_000 + SMALL,
    ),
    peak("an argument", Cell(Completes, "take(large)"), 2 * LARGE + SMALL),
    peak("an argument of bytes", Cell(Completes, "take(large.encode())"), 2 * LARGE + SMALL),
    peak("an argument beyond the limit", Cell(Breaks, "take(large * 7)"), SMALL),
    // As many parts as are taken, and more.
    peak("numbers", Cell(Completes, "take([0] * 2_000_000)"), PARSED_BYTES_MAX),
    peak("lists", Cell(Completes, "take([[]] * 650_000)"), PARSED_BYTES_MAX),
    peak("dicts", Cell(Completes, "take([{'a': 0}] * 170_000)"), PARSED_BYTES_MAX),
    peak("dicts beyond the limit", Cell(Breaks, "take([{'a': 0}] * 200_000)"), SMALL),
    peak(
        "an answer",
        Cell(Completes, "answer['content'] = large * 2; answer['ready'] = True"),
        2 * ANSWER_BYTES_MAX + SMALL,
    ),
    peak("variables after a cell", Cell(Completes, VARIABLES), SMALL),
    // A thousand are listed, of 512 characters of their names and 500 of their values.
    peak("a list of variables", Variables(VARIABLES), 4 << 20),
    peak("a variable", Variable("it = large"), 2 * LARGE + SMALL),
    peak("random bytes", Cell(Completes, "import os\nr = os.urandom(len(large))"), SMALL),
    // Short writes and reads, so that there is no limit to what is there at last but the guest's own.
    peak(
        "a long write",
        Cell(
            Completes,
            "with open('/tmp/f', 'wb') as f: assert f.write(large.encode() * 4) == 160_000_000",
        ),
        FILE_BYTES_MAX + SMALL,
    ),
    peak(
        "a write beyond the limit",
        Cell(Raises("OSError"), "with open('/tmp/f', 'wb') as f: f.write(large.encode() * 6)"),
        FILE_BYTES_MAX + SMALL,
    ),
    peak(
        "a long read",
        Cell(Completes, "assert len(open('/data/long', 'rb').read()) == 200_000_000"),
        FILE_BYTES_MAX + SMALL,
    ),
    peak("a path", Cell(Raises("OSError"), "open('/tmp/' + large)"), SMALL),
];

impl Peak {
    /// # Errors
    ///
    /// Says what was held, if it's too much.
    pub(crate) async fn check(&self, host: &Host) -> Result<(), Failed> {
        let limits = Limits {
            output_bytes: OUTPUT_BYTES,
            disk_bytes: DISK_BYTES,
            memory_bytes: 2 << 30,
            ..Limits::default()
        };
        let lm = Arc::new(ScriptedHandler::from_fn(|_| Ok("ok".to_owned())));
        let mut session = open(EnvironmentOptions { limits, lm: Some(lm), ..host.options() });
        session.execute(&format!("large = 'x' * {LARGE}")).await?;
        if let Variables(code) | Variable(code) = self.work {
            assert!(Completes.is_met(&session.execute(code).await), "{}", self.name);
        }
        // A cell begins when the checkpoint of the one before is there: this waits for a large one.
        session.execute("1").await?;
        held::at_rest().await;
        HEAP.reset_peak_usage();
        let before = HEAP.peak_usage();
        match &self.work {
            Cell(end, code) => {
                let result = session.execute(code).await;
                if !end.is_met(&result) {
                    return Err(format!("{:.1000}", format!("{result:?}")).into());
                }
            }
            Variables(_) => assert_eq!(session.list_variables().await?.len(), 1000),
            Variable(_) => assert!(session.get_variable("it").await?.is_some()),
        }
        let bytes = (HEAP.peak_usage() - before) as u64;
        if bytes > self.bytes_max {
            return Err(format!("{bytes} bytes, and {} are allowed", self.bytes_max).into());
        }
        Ok(())
    }
}
