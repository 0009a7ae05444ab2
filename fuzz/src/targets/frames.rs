//! What a guest says to its session, frame by frame: `protocol` and `agent` without a guest.
//!
//! An input is a byte of options, a byte that says what the turn asks for, and steps:
//!
//! | byte | step |
//! |---|---|
//! | 0 | a frame: the text of its header after 16 bits of length, and likewise its body |
//! | 1 | a frame as it is, after 16 bits of length |
//! | 2 | the frame that asks for the next request |
//! | 3 | the turn ends; a byte says what the next one asks for |
//!
//! The guest's memory, which frames may refer to, is the input itself.
//!
//! What has to hold, whatever the guest says:
//! - it is answered, or it broke the protocol and its session is told so by that name;
//! - an answer is one that the agent can read, and no larger than what it's made from allows;
//! - no more calls are answered than the limits allow;
//! - the next turn of a good guest goes as if nothing had been.

use std::sync::Arc;

use kaa::fuzzing::{Ask, Reply, Talk};
use kaa::lm::ScriptedHandler;
use kaa::{EnvironmentOptions, Error, Limits, Outcome, Profile, Tool, ToolError, Value};

use super::block_on;
use super::input::Input;

const LM_CALLS: u32 = 6;
const TOOL_CALLS: u32 = 6;
/// Room for what an answer has beside the guest's own words.
const ANSWER_BYTES: usize = 16 << 10;
/// A byte that isn't text becomes three, and each of them six in JSON.
const GROWTH: usize = 32;

pub(crate) fn run(input: &[u8]) -> bool {
    block_on(converse(input))
}

/// Whether all that was said was understood.
async fn converse(bytes: &[u8]) -> bool {
    let mut input = Input(bytes);
    let options = options(input.u8());
    let mut talk = Talk::new(&options).unwrap();
    let mut ask = ask(input.u8());
    talk.begin(ask, &options).unwrap();
    let mut is_good = true;
    while !input.is_empty() {
        let frame = match input.u8() % 4 {
            0 => frame(input.string(), input.string()),
            1 => input.string().to_vec(),
            2 => frame(br#"{"op":"next"}"#, b""),
            _ => {
                is_good &= check_end(talk.end(ask));
                ask = self::ask(input.u8());
                talk.begin(ask, &options).unwrap();
                continue;
            }
        };
        match talk.say(&frame, bytes).await {
            Ok(answer) => check_answer(&answer, frame.len() + bytes.len()),
            Err(Error::Protocol { .. }) => {
                is_good = false;
                break;
            }
            Err(error) => panic!("a guest's frame led to {error:?}"),
        }
    }
    is_good &= check_end(talk.end(ask));
    check_that_it_goes_on(&mut talk, &options).await;
    is_good
}

/// A session of the kind that the bits name.
pub(crate) fn options(bits: u8) -> EnvironmentOptions {
    let echo = Tool::new("echo", |call| Ok(call.args.into_iter().next().unwrap_or(Value::None)));
    let fail = Tool::new("fail", |call| Err(ToolError::new(format!("{call:?}"))));
    let profile = if bits & 1 == 0 { Profile::Rlm } else { Profile::OpenEnv };
    EnvironmentOptions {
        limits: Limits { lm_calls: LM_CALLS, tool_calls: TOOL_CALLS, ..Limits::default() },
        profile,
        lm: (bits & 2 == 0).then(|| Arc::new(ScriptedHandler::echo()) as _),
        tools: if bits & 4 == 0 { vec![echo, fail] } else { Vec::new() },
        ..EnvironmentOptions::default()
    }
}

fn ask(byte: u8) -> Ask {
    [Ask::Cell, Ask::Variable, Ask::Variables, Ask::History][usize::from(byte) % 4]
}

/// A frame with this header and body.
pub(crate) fn frame(header: &[u8], body: &[u8]) -> Vec<u8> {
    [&(header.len() as u32).to_be_bytes(), header, body].concat()
}

/// An answer is nothing, a text, or a header that is an object and its body.
fn check_answer(answer: &[u8], of_bytes: usize) {
    assert!(answer.len() <= ANSWER_BYTES + GROWTH * of_bytes, "{} bytes", answer.len());
    match answer {
        [] => {}
        [b'T', text @ ..] => assert!(std::str::from_utf8(text).is_ok(), "{text:?}"),
        [a, b, c, d, rest @ ..] => {
            let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
            let header = rest.get(..length).expect("a header that is all there");
            let header: serde_json::Value = serde_json::from_slice(header).expect("JSON");
            assert!(header.is_object(), "{header}");
        }
        short => panic!("{short:?}"),
    }
}

fn check_end(end: kaa::Result<Reply>) -> bool {
    match end {
        Ok(Reply::Cell(cell)) => {
            assert!(cell.lm_calls.len() <= LM_CALLS as usize, "{}", cell.lm_calls.len());
            assert!(cell.usage.lm_calls <= LM_CALLS && cell.usage.tool_calls <= TOOL_CALLS);
            assert!(cell.variables.len() <= 1000, "{}", cell.variables.len());
        }
        Ok(Reply::Variables(variables)) => assert!(variables.len() <= 1000),
        Ok(Reply::Variable(_) | Reply::History(_)) => {}
        // What the agent refuses it refuses with its own words.
        Err(Error::Protocol { .. } | Error::Invalid { .. }) => return false,
        Err(error) => panic!("a guest's reply led to {error:?}"),
    }
    true
}

/// A guest that does what it is asked.
async fn check_that_it_goes_on(talk: &mut Talk, options: &EnvironmentOptions) {
    talk.begin(Ask::Cell, options).unwrap();
    let mut request = talk.say(&frame(br#"{"op":"next"}"#, b""), b"").await.unwrap();
    let mut requests = 0;
    while !request.is_empty() {
        requests += 1;
        assert!(requests <= 3, "settings, tools, and the cell");
        let report = frame(br#"{"op":"done","outcome":"completed","value":"2"}"#, b"");
        request = talk.say(&report, b"").await.unwrap();
    }
    match talk.end(Ask::Cell) {
        Ok(Reply::Cell(cell)) => assert_eq!(
            (cell.outcome, cell.value.as_deref(), cell.lm_calls.len(), cell.usage.lm_calls),
            (Outcome::Completed, Some("2"), 0, 0)
        ),
        other => panic!("{other:?}"),
    }
}
