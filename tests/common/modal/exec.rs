//! A process of a sandbox: its stdin by offset, its output kept in files and read from any offset.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStdin, Command};
use tokio::sync::{Mutex, watch};
use tonic::Status;

/// The bytes of one message of output at most.
const MESSAGE_BYTES: usize = 256 << 10;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match status.code() {
            Some(code) => Self::Code(code),
            None => Self::Signal(status.signal().unwrap_or(9)),
        }
    }
}

/// What to do with an output of a process.
pub(crate) struct Wanted {
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) timeout: Option<Duration>,
}

/// A process that was started, whether or not it has ended.
pub(crate) struct Exec {
    pub(crate) pid: u32,
    stdin: Mutex<Stdin>,
    /// Counts up when the writes under way have to give up.
    evictions: watch::Sender<u64>,
    outputs: [Output; 2],
    exit: watch::Receiver<Option<Exit>>,
}

struct Stdin {
    /// What the process took or its pipe holds.
    written: u64,
    pipe: Option<ChildStdin>,
    is_closed: bool,
}

/// What a process wrote: kept on disk, because nothing limits it.
struct Output {
    file: Arc<File>,
    /// Its length, and whether that's all.
    state: watch::Receiver<(u64, bool)>,
}

impl Output {
    fn of(pipe: Option<impl AsyncRead + Unpin + Send + 'static>, path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        let file = Arc::new(options.read(true).write(true).create_new(true).open(path)?);
        let (grow, state) = watch::channel((0, pipe.is_none()));
        if let Some(mut pipe) = pipe {
            let file = file.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; MESSAGE_BYTES];
                let mut length = 0;
                while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
                    if file.write_all_at(&buffer[..count], length).is_err() {
                        break;
                    }
                    length += count as u64;
                    grow.send_replace((length, false));
                }
                grow.send_replace((length, true));
            });
        }
        Ok(Self { file, state })
    }
}

impl Exec {
    /// Starts it. Its output goes into files in `folder`, which nobody else writes to.
    pub(crate) fn start(
        command: &mut Command,
        wanted: &Wanted,
        folder: &Path,
        name: &str,
    ) -> io::Result<Self> {
        let piped = |is_wanted| if is_wanted { Stdio::piped() } else { Stdio::null() };
        command.stdin(Stdio::piped()).stdout(piped(wanted.stdout)).stderr(piped(wanted.stderr));
        let mut child = command.process_group(0).spawn()?;
        let pid = child.id().unwrap_or(0);
        let outputs = [
            Output::of(child.stdout.take(), &folder.join(format!("{name}.stdout")))?,
            Output::of(child.stderr.take(), &folder.join(format!("{name}.stderr")))?,
        ];
        let stdin = Stdin { written: 0, pipe: child.stdin.take(), is_closed: false };
        let (tell, exit) = watch::channel(None);
        let timeout = wanted.timeout;
        tokio::spawn(async move {
            let deadline = async {
                match timeout {
                    Some(time) => tokio::time::sleep(time).await,
                    None => std::future::pending().await,
                }
            };
            let status = tokio::select! {
                status = child.wait() => status,
                () = deadline => {
                    super::procs::kill_group(pid);
                    child.wait().await
                }
            };
            tell.send_replace(Some(status.map_or(Exit::Signal(9), Exit::from)));
        });
        let evictions = watch::Sender::new(0);
        Ok(Self { pid, stdin: Mutex::new(stdin), evictions, outputs, exit })
    }

    pub(crate) fn poll(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let found = exit.wait_for(Option::is_some).await;
        found.ok().and_then(|exit| *exit).unwrap_or(Exit::Signal(9))
    }

    /// What it wrote from `offset` on, as it's written; it ends after the process has.
    pub(crate) fn read(
        self: Arc<Self>,
        fd: usize,
        offset: u64,
    ) -> BoxStream<'static, Result<Bytes, Status>> {
        let state = self.outputs[fd].state.clone();
        let next = move |(exec, mut state, offset): (Arc<Self>, _, u64)| async move {
            let state_ref: &mut watch::Receiver<(u64, bool)> = &mut state;
            let found = state_ref.wait_for(|(length, is_all)| *length > offset || *is_all).await;
            let length = found.map_or(0, |found| found.0);
            if length <= offset {
                exec.wait().await;
                return None;
            }
            let count = usize::try_from(length - offset).unwrap_or(usize::MAX).min(MESSAGE_BYTES);
            let mut data = vec![0; count];
            let read = exec.outputs[fd].file.read_exact_at(&mut data, offset);
            let item = read
                .map(|()| Bytes::from(data))
                .map_err(|error| Status::internal(format!("output can't be read: {error}")));
            Some((item, (exec, state, offset + count as u64)))
        };
        stream::unfold((self, state, offset), next).boxed()
    }

    /// Writes what isn't there yet of `data`, which begins at `offset`, and closes after it if `eof`.
    /// It waits until the process's pipe has taken it.
    pub(crate) async fn write(&self, offset: u64, data: &[u8], eof: bool) -> Result<(), Status> {
        let mut evicted = self.evictions.subscribe();
        tokio::select! {
            biased;
            _ = evicted.changed() => Err(Status::aborted("evicted by TaskExecStdinStatus")),
            done = self.write_all(offset, data, eof) => done,
        }
    }

    async fn write_all(&self, offset: u64, data: &[u8], eof: bool) -> Result<(), Status> {
        let mut stdin = self.stdin.lock().await;
        let end = offset + data.len() as u64;
        if offset > stdin.written {
            let written = stdin.written;
            let message = format!("a write at {offset} leaves a gap after {written}");
            return Err(Status::failed_precondition(message));
        }
        if stdin.is_closed && end > stdin.written {
            return Err(Status::failed_precondition("stdin is closed"));
        }
        while stdin.written < end {
            // The bytes before are there already: a write whose response was lost came again.
            let at = usize::try_from(stdin.written - offset).unwrap_or(usize::MAX);
            let Some(pipe) = &mut stdin.pipe else {
                return Err(Status::failed_precondition("stdin is closed"));
            };
            match pipe.write(&data[at..]).await {
                Ok(count) => stdin.written += count as u64,
                Err(error) => {
                    stdin.pipe = None;
                    let message = format!("the process doesn't read its stdin any more: {error}");
                    return Err(Status::failed_precondition(message));
                }
            }
        }
        if eof {
            stdin.pipe = None;
            stdin.is_closed = true;
        }
        Ok(())
    }

    /// How much was written and whether stdin is closed, after making the writes under way give up.
    pub(crate) async fn stdin_status(&self) -> (u64, bool) {
        self.evictions.send_modify(|count| *count += 1);
        let stdin = self.stdin.lock().await;
        (stdin.written, stdin.is_closed)
    }

    /// Counts up when a stream of writes has to give up.
    pub(crate) fn evictions(&self) -> watch::Receiver<u64> {
        self.evictions.subscribe()
    }
}
