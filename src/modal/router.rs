//! The worker that a sandbox runs on: processes in it, and their bytes.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Mutex;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use super::channel;
use super::client::ModalClient;
use super::fault::Fault;
use super::proto::client as control;
use super::proto::task_command_router as wire;
use super::proto::task_command_router::task_command_router_client::TaskCommandRouterClient;
use super::retry::{Attempt, Persistence, Rules, persist};

/// How long a worker may take until its door is open: it may have been given the sandbox just now.
const OPEN_TIME: Duration = Duration::from_secs(310);
/// How long Modal may take to make an image of a file system.
const SNAPSHOT_TIME: Duration = Duration::from_secs(300);
/// How long it holds the question whether a process has ended.
const WAIT_TIME: Duration = Duration::from_secs(60);

type Stub = TaskCommandRouterClient<Channel>;

/// Which of a process's streams.
pub(super) use self::wire::TaskExecStdioFileDescriptor as Descriptor;

/// The door of a worker to one sandbox.
pub(super) struct Router {
    client: ModalClient,
    sandbox: String,
    /// What Modal gave with it.
    sandbox_token: Option<String>,
    task: String,
    channel: Channel,
    pass: Mutex<AsciiMetadataValue>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("task", &self.task).finish_non_exhaustive()
    }
}

/// A process to start.
#[derive(Debug, Clone, Default)]
pub(super) struct Command {
    pub(super) arguments: Vec<String>,
    pub(super) workdir: Option<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) time: Option<Duration>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessExit {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Router {
    /// The door at this address. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// A fault for an address that Modal doesn't give.
    pub(super) fn new(
        client: &ModalClient,
        (sandbox, sandbox_token): (&str, Option<&str>),
        task: &str,
        access: &control::CommandRouterAccess,
    ) -> Result<Self, Fault> {
        // The pass would be readable on the way.
        if !access.url.starts_with("https://") && !client.is_local() {
            let text = format!("the worker's address isn't https: {}", access.url);
            return Err(Fault::new(Code::Aborted, text));
        }
        let channel = channel::endpoint(&access.url, client.roots())?.connect_lazy();
        Ok(Self {
            client: client.clone(),
            sandbox: sandbox.into(),
            sandbox_token: sandbox_token.map(str::to_owned),
            task: task.into(),
            channel,
            pass: Mutex::new(pass(&access.jwt)?),
        })
    }

    fn stub(&self) -> Stub {
        TaskCommandRouterClient::new(self.channel.clone())
            .max_decoding_message_size(channel::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(channel::MESSAGE_BYTES_MAX)
    }

    async fn request<Q>(&self, message: Q, throttled: u32) -> Request<Q> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.pass.lock().await.clone());
        if let Ok(value) = AsciiMetadataValue::try_from(throttled.to_string()) {
            request.metadata_mut().insert("x-throttle-retry-attempt", value);
        }
        request
    }

    /// Gets a new pass, after the old one was refused.
    ///
    /// # Errors
    ///
    /// The fault of asking for it.
    async fn refresh(&self, refused: &AsciiMetadataValue) -> Result<(), Fault> {
        let mut kept = self.pass.lock().await;
        // Another call, which was refused at the same time, may have got one.
        if *kept != *refused {
            return Ok(());
        }
        let access = self.client.access(&self.sandbox, self.sandbox_token.as_deref());
        *kept = pass(&access.await?.jwt)?;
        Ok(())
    }

    /// Makes a call, again if it has to be.
    async fn call<Q, A, F>(
        &self,
        rules: Rules,
        message: Q,
        call: impl Fn(Stub, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let (message, call) = (&message, &call);
        let pass = self.pass().await;
        let attempt = |attempt: Attempt| async move {
            let request = self.request(message.clone(), attempt.throttled).await;
            call(self.stub(), request).await.map(Response::into_inner)
        };
        match persist(rules, attempt).await {
            Err(fault) if fault.code == Code::Unauthenticated => {
                self.refresh(&pass).await?;
                persist(rules, attempt).await.map_err(refused)
            }
            done => done,
        }
    }

    /// The pass that calls have now.
    pub(super) async fn pass(&self) -> AsciiMetadataValue {
        self.pass.lock().await.clone()
    }

    /// Does about the fault of a long call what can be done, and waits for as long as that takes. The call
    /// had this pass, or a later one.
    ///
    /// # Errors
    ///
    /// The fault, if it's final.
    pub(super) async fn recover(
        &self,
        persistence: &mut Persistence,
        pass: &AsciiMetadataValue,
        mut fault: Fault,
    ) -> Result<(), Fault> {
        if fault.code == Code::Unauthenticated && !persistence.is_refreshed {
            match self.refresh(pass).await {
                Ok(()) => {
                    persistence.is_refreshed = true;
                    return Ok(());
                }
                Err(unrefreshed) => fault = unrefreshed,
            }
        }
        let Some(pause) = persistence.pause(&fault) else { return Err(refused(fault)) };
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn rules(&self) -> Rules {
        Rules::router(self.client.throttle())
    }

    /// Starts a process under an id that is the caller's: the same one never starts two.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn start(&self, exec: &str, command: &Command) -> Result<(), Fault> {
        let mut env = control::StringMap::default();
        env.contents.extend(command.env.iter().cloned());
        let source = control::secret_source::Source::Env(env);
        let sources = vec![control::SecretSource { source: Some(source) }];
        let message = wire::TaskExecStartRequest {
            task_id: self.task.clone(),
            exec_id: exec.into(),
            command_args: command.arguments.clone(),
            stdout_config: wire::TaskExecStdoutConfig::Pipe.into(),
            stderr_config: wire::TaskExecStderrConfig::Pipe.into(),
            timeout_secs: command.time.map(|time| time.as_secs().try_into().unwrap_or(u32::MAX)),
            workdir: command.workdir.clone(),
            secret_sources: if command.env.is_empty() { Vec::new() } else { sources },
        };
        let rules = self.rules().patient(OPEN_TIME);
        let started = self.call(rules, message, |mut stub, request| async move {
            stub.task_exec_start(request).await
        });
        started.await.map(drop)
    }

    /// Opens one of a process's streams at an offset.
    ///
    /// # Errors
    ///
    /// The fault. Nothing is tried again here.
    pub(super) async fn read(
        &self,
        exec: &str,
        offset: u64,
        descriptor: Descriptor,
    ) -> Result<Streaming<wire::TaskExecStdioReadResponse>, Fault> {
        let message = wire::TaskExecStdioReadRequest {
            task_id: self.task.clone(),
            exec_id: exec.into(),
            offset,
            file_descriptor: descriptor.into(),
        };
        let request = self.request(message, 0).await;
        Ok(self.stub().task_exec_stdio_read(request).await?.into_inner())
    }

    /// Writes to a process's stdin. What was written before at the same offset is not written again.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn write(
        &self,
        exec: &str,
        offset: u64,
        data: Bytes,
        eof: bool,
        patience: Duration,
    ) -> Result<(), Fault> {
        let message = wire::TaskExecStdinWriteRequest {
            task_id: self.task.clone(),
            exec_id: exec.into(),
            offset,
            data,
            eof,
        };
        let rules = self.rules().patient(patience);
        let written = self.call(rules, message, |mut stub, request| async move {
            stub.task_exec_stdin_write(request).await
        });
        written.await.map(drop)
    }

    /// Writes to a process's stdin for as long as there are messages.
    ///
    /// # Errors
    ///
    /// The fault. Nothing is tried again here: what arrived, [`written`](Self::written) tells.
    pub(super) async fn write_stream(
        &self,
        messages: impl futures_util::Stream<Item = wire::TaskExecStdinWriteStreamRequest>
        + Send
        + 'static,
    ) -> Result<(), Fault> {
        let request = self.request(messages, 0).await;
        self.stub().task_exec_stdin_write_stream(request).await?;
        Ok(())
    }

    /// What begins a stream of writes.
    pub(super) fn stream_start(
        &self,
        exec: &str,
        offset: u64,
    ) -> wire::TaskExecStdinWriteStreamRequest {
        let start = wire::TaskExecStdinWriteStreamStart {
            task_id: self.task.clone(),
            exec_id: exec.into(),
            offset,
        };
        let payload = wire::task_exec_stdin_write_stream_request::Payload::Start(start);
        wire::TaskExecStdinWriteStreamRequest { payload: Some(payload) }
    }

    /// How many bytes of its stdin a process was given, and whether that was all. Ends the stream of
    /// writes that is open.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn written(
        &self,
        exec: &str,
        patience: Duration,
    ) -> Result<(u64, bool), Fault> {
        let message =
            wire::TaskExecStdinStatusRequest { task_id: self.task.clone(), exec_id: exec.into() };
        let rules = self.rules().patient(patience);
        let status = self.call(rules, message, |mut stub, request| async move {
            stub.task_exec_stdin_status(request).await
        });
        status.await.map(|status| (status.num_bytes_written, status.closed))
    }

    /// Waits until a process has ended.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn wait(&self, exec: &str, patience: Duration) -> Result<ProcessExit, Fault> {
        loop {
            let message =
                wire::TaskExecWaitRequest { task_id: self.task.clone(), exec_id: exec.into() };
            let rules = self.rules().attempt(WAIT_TIME * 2).patient(patience);
            let waited = self.call(rules, message, |mut stub, request| async move {
                match tokio::time::timeout(WAIT_TIME, stub.task_exec_wait(request)).await {
                    Ok(answer) => answer.map(|answer| answer.map(Some)),
                    // It runs for longer than questions are held.
                    Err(_) => Ok(Response::new(None)),
                }
            });
            use wire::task_exec_wait_response::ExitStatus;
            match waited.await {
                Ok(None) => {}
                Ok(Some(answer)) => match answer.exit_status {
                    Some(ExitStatus::Code(code)) => return Ok(ProcessExit::Code(code)),
                    Some(ExitStatus::Signal(signal)) => return Ok(ProcessExit::Signal(signal)),
                    None => return Err(Fault::new(Code::Internal, "it ended without a status")),
                },
                Err(fault) => return Err(fault),
            }
        }
    }

    /// How a process ended, if it has.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn poll(&self, exec: &str) -> Result<Option<ProcessExit>, Fault> {
        let message =
            wire::TaskExecPollRequest { task_id: self.task.clone(), exec_id: exec.into() };
        let polled = self.call(self.rules(), message, |mut stub, request| async move {
            stub.task_exec_poll(request).await
        });
        use wire::task_exec_poll_response::ExitStatus;
        Ok(polled.await?.exit_status.map(|status| match status {
            ExitStatus::Code(code) => ProcessExit::Code(code),
            ExitStatus::Signal(signal) => ProcessExit::Signal(signal),
        }))
    }

    /// Makes an image of the sandbox's files, under an id that is the caller's: the same one never
    /// makes two. `ttl` is how long Modal keeps it, nothing for as long as it keeps anything.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn snapshot(&self, id: &str, ttl: Option<Duration>) -> Result<String, Fault> {
        let message = wire::TaskSnapshotFilesystemRequest {
            task_id: self.task.clone(),
            snapshot_id: id.into(),
            ttl_seconds: Some(ttl.map_or(-1, |ttl| ttl.as_secs().try_into().unwrap_or(i64::MAX))),
        };
        let rules = self.rules().attempt(SNAPSHOT_TIME);
        let made = self.call(rules, message, |mut stub, request| async move {
            stub.task_snapshot_filesystem(request).await
        });
        made.await.map(|made| made.image_id)
    }
}

/// A pass that was given just now and is refused is none of the user's affair, as a token would be.
fn refused(fault: Fault) -> Fault {
    match fault.code {
        Code::Unauthenticated => {
            let message = format!("the worker refuses the pass that it gave: {}", fault.message);
            Fault { code: Code::Aborted, message, ..fault }
        }
        _ => fault,
    }
}

fn pass(token: &str) -> Result<AsciiMetadataValue, Fault> {
    let mut value = AsciiMetadataValue::try_from(format!("Bearer {token}"))
        .map_err(|_| Fault::new(Code::Internal, "it gave a pass that is none"))?;
    value.set_sensitive(true);
    Ok(value)
}
