//! A supervisor that says what it likes: sessions in processes, from their streams up.
//!
//! An input is a byte of options (those of `frames`) and what supervisors say, one after the other:
//!
//! | byte | what is said |
//! |---|---|
//! | 0 | there is a worker |
//! | 1 | a call of the worker: its number in a byte, the header and the body, each after 16 bits of length |
//! | 2 | bytes of the worker, after 16 bits of length |
//! | 3 | an event, likewise |
//! | 4, 5 | what it wrote to stdout and stderr, likewise |
//! | 6 | bytes that are no frame unless they make themselves one, likewise |
//! | 7 | the call of the worker that asks for something to do, its number in a byte |
//! | 8 | nothing, until the host had time to read and answer |
//! | 9 | nothing any more: the next one that is started says the rest |
//!
//! What has to hold: whatever is said, each operation of the session ends, with a result or an error
//! that isn't a fault of Kaa's own, and a session that was lost says so until it's reset. The clock stands
//! still unless everything waits for it, so that what waits for a word waits for no time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kaa::fuzzing::{Reader, Writer, backend};
use kaa::{Backend, Environment, EnvironmentExt, Error, Limits, Outcome, Status, Value};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

use super::frames::{frame, options};
use super::input::Input;

const PIPE_BYTES: usize = 64 << 10;
const OUTPUT_BYTES: u64 = 1000;
/// The first bytes of the host's frame of settings.
const BOOT: u8 = b'B';
const NEXT: &[u8] = br#"{"op":"next"}"#;
const READY: &[u8] = br#"{"event":"ready","python":"3.11.2","dill":true,"worker":1}"#;

/// What one supervisor says.
type Script = Vec<Said>;

enum Said {
    Frame(u8, Vec<u8>),
    Call { number: u8, bytes: Vec<u8> },
    Raw(Vec<u8>),
    Pause,
}

pub(crate) fn run(input: &[u8]) -> bool {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(use_session(input))
}

/// Whether its cell completed.
async fn use_session(input: &[u8]) -> bool {
    let mut input = Input(input);
    let options = options(input.u8());
    let limits = Limits { output_bytes: OUTPUT_BYTES, ..options.limits.clone() };
    let options = kaa::EnvironmentOptions { limits, ..options };
    let scripts = Arc::new(Mutex::new(scripts(input)));
    let connect = move || {
        let script = scripts.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let (near, far) = tokio::io::duplex(PIPE_BYTES);
        tokio::spawn(speak(far, script.unwrap_or_default()));
        let (reader, writer) = tokio::io::split(near);
        (Box::new(reader) as Reader, Box::new(writer) as Writer)
    };
    let backend = backend(connect);
    let Some(mut session) = sound(backend.open(options).await) else { return false };
    let cell = sound(session.execute("1 + 1").await);
    if let Some(cell) = &cell {
        for stream in [&cell.stdout, &cell.stderr] {
            assert!(stream.bytes.len() as u64 <= OUTPUT_BYTES + 1000, "{}", stream.bytes.len());
        }
        assert!(cell.lm_calls.len() <= options_lm_calls());
        // An end of the worker costs the state, unless it was the cell that ended.
        let is_lost = session.status() == Status::Poisoned;
        assert!(!is_lost || cell.outcome != Outcome::Completed);
    }
    check_lost(&mut *session).await;
    let snapshot = sound(session.snapshot().await);
    sound(session.get_variable("x").await);
    sound(session.list_variables().await);
    sound(session.set_variable("x", Value::from("y".repeat(5000))).await);
    if let Some(snapshot) = snapshot {
        sound(session.restore(&snapshot).await);
    }
    check_lost(&mut *session).await;
    if sound(session.reset().await).is_some() {
        sound(session.execute("2").await);
    }
    session.close().await.unwrap();
    cell.is_some_and(|cell| cell.outcome == Outcome::Completed)
}

fn options_lm_calls() -> usize {
    options(0).limits.lm_calls as usize
}

/// What an operation returned, if it isn't an error.
fn sound<T>(result: kaa::Result<T>) -> Option<T> {
    match result {
        Err(error @ (Error::Internal(_) | Error::Closed | Error::Quota { .. })) => {
            panic!("a supervisor's words led to {error:?}")
        }
        result => result.ok(),
    }
}

async fn check_lost(session: &mut dyn Environment) {
    if session.status() == Status::Poisoned {
        let result = session.get_variable("x").await;
        assert!(matches!(result, Err(Error::Poisoned { .. })), "{result:?}");
    }
}

fn scripts(mut input: Input<'_>) -> VecDeque<Script> {
    let mut scripts = VecDeque::from([Script::new()]);
    while !input.is_empty() {
        let said = match input.u8() % 10 {
            0 => Said::Frame(b'C', READY.to_vec()),
            1 => {
                let number = input.u8();
                Said::Call { number, bytes: frame(input.string(), input.string()) }
            }
            2 => Said::Frame(b'D', input.string().to_vec()),
            3 => Said::Frame(b'C', input.string().to_vec()),
            4 => Said::Frame(b'O', input.string().to_vec()),
            5 => Said::Frame(b'E', input.string().to_vec()),
            6 => Said::Raw(input.string().to_vec()),
            7 => Said::Call { number: input.u8(), bytes: frame(NEXT, b"") },
            8 => Said::Pause,
            _ => {
                scripts.push_back(Script::new());
                continue;
            }
        };
        scripts.back_mut().expect("there is one").push(said);
    }
    scripts
}

/// A supervisor: hears its settings, says what it has to say, and is gone.
async fn speak(stream: DuplexStream, script: Script) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let Some(token) = token(&mut reader).await else { return };
    let hear = async move { while reader.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {} };
    let say = async move {
        for said in script {
            if say(&mut writer, said, token).await.is_err() {
                return;
            }
        }
        // Nothing more will come, and nobody reads.
        let _ = writer.shutdown().await;
    };
    tokio::select! {
        () = say => {}
        () = hear => {}
    }
}

async fn say(
    writer: &mut WriteHalf<DuplexStream>,
    said: Said,
    token: [u8; 8],
) -> std::io::Result<()> {
    let framed = |kind: u8, bytes: &[u8]| [&[kind][..], &frame(bytes, b"")].concat();
    let bytes = match said {
        Said::Frame(kind, bytes) => framed(kind, &bytes),
        Said::Call { number, bytes } => {
            let head = [0; 12];
            let length = (bytes.len() as u32).to_be_bytes();
            let number = u32::from(number).to_be_bytes();
            framed(b'D', &[&head[..], &length, &number, &token, &bytes].concat())
        }
        Said::Raw(bytes) => bytes,
        Said::Pause => {
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Ok(());
        }
    };
    writer.write_all(&bytes).await
}

/// The token of the worker's calls, from what the host says first: the sources of the supervisor in three
/// parts, and a frame of settings and sources.
async fn token(reader: &mut ReadHalf<DuplexStream>) -> Option<[u8; 8]> {
    for _ in 0..3 {
        let length = reader.read_u32().await.ok()?;
        skip(reader, length.into()).await?;
    }
    assert_eq!(reader.read_u8().await.ok()?, BOOT);
    let rest = reader.read_u32().await.ok()?;
    let length = reader.read_u32().await.ok()?;
    let mut settings = vec![0; length as usize];
    reader.read_exact(&mut settings).await.ok()?;
    skip(reader, u64::from(rest - 4 - length)).await?;
    let settings: serde_json::Value = serde_json::from_slice(&settings).expect("JSON");
    let token = settings["token"].as_str().expect("a token");
    Some(u64::from_str_radix(token, 16).expect("a number").to_be_bytes())
}

async fn skip(reader: &mut ReadHalf<DuplexStream>, length: u64) -> Option<()> {
    let mut part = reader.take(length);
    (tokio::io::copy(&mut part, &mut tokio::io::sink()).await.ok()? == length).then_some(())
}
