//! Modal's workers: processes in sandboxes.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::control::variables;
use super::exec::{Exec, Exit, Wanted};
use super::gate::ForTask;
use super::proto::task_command_router::task_command_router_server::TaskCommandRouter;
use super::proto::task_command_router::task_exec_stdin_write_stream_request::Payload;
use super::proto::task_command_router::*;
use super::proto::task_command_router::{task_exec_poll_response, task_exec_wait_response};
use super::sandbox::Sandbox;
use super::world::World;

/// The characters of a command's arguments in all.
const ARGUMENT_CHARS_MAX: usize = 65_536;

/// The service.
pub(crate) struct Router(pub(crate) Arc<World>);

type Answer<T> = Result<Response<T>, Status>;

impl Router {
    /// The task that this token is for.
    fn task<T>(&self, request: &Request<T>, id: &str) -> Result<Arc<Sandbox>, Status> {
        let token = request.extensions().get::<ForTask>();
        let sandbox = self.0.task(id)?;
        match token {
            Some(ForTask(task)) if task == id => Ok(sandbox),
            _ => Err(Status::permission_denied("the token is for another task")),
        }
    }

    fn exec<T>(&self, request: &Request<T>, task: &str, id: &str) -> Result<Arc<Exec>, Status> {
        self.task(request, task)?.exec(id)
    }
}

#[tonic::async_trait]
impl TaskCommandRouter for Router {
    async fn task_exec_start(
        &self,
        request: Request<TaskExecStartRequest>,
    ) -> Answer<TaskExecStartResponse> {
        let start = request.get_ref();
        let sandbox = self.task(&request, &start.task_id)?;
        if start.exec_id.is_empty() {
            return Err(Status::invalid_argument("no exec_id"));
        }
        let chars: usize = start.command_args.iter().map(|text| text.chars().count()).sum();
        if chars > ARGUMENT_CHARS_MAX {
            let message = format!("command_args have {chars} of {ARGUMENT_CHARS_MAX} characters");
            return Err(Status::invalid_argument(message));
        }
        if start.stderr_config() == TaskExecStderrConfig::Stdout {
            return Err(Status::unimplemented("stderr into stdout"));
        }
        let wanted = Wanted {
            stdout: start.stdout_config() == TaskExecStdoutConfig::Pipe,
            stderr: start.stderr_config() == TaskExecStderrConfig::Pipe,
            timeout: start.timeout_secs.map(|secs| Duration::from_secs(secs.into())),
        };
        let env = variables(&self.0, &start.secret_sources)?;
        let workdir = start.workdir.as_deref();
        sandbox.start(&start.exec_id, &start.command_args, workdir, env, &wanted)?;
        Ok(Response::new(TaskExecStartResponse {}))
    }

    type TaskExecStdioReadStream = BoxStream<'static, Result<TaskExecStdioReadResponse, Status>>;

    async fn task_exec_stdio_read(
        &self,
        request: Request<TaskExecStdioReadRequest>,
    ) -> Answer<Self::TaskExecStdioReadStream> {
        let read = request.get_ref();
        let exec = self.exec(&request, &read.task_id, &read.exec_id)?;
        let fd = match read.file_descriptor() {
            TaskExecStdioFileDescriptor::Stdout => 0,
            TaskExecStdioFileDescriptor::Stderr => 1,
        };
        let pieces = exec.read(fd, read.offset);
        let messages = pieces.map(|piece| piece.map(|data| TaskExecStdioReadResponse { data }));
        Ok(Response::new(messages.boxed()))
    }

    async fn task_exec_stdin_write(
        &self,
        request: Request<TaskExecStdinWriteRequest>,
    ) -> Answer<TaskExecStdinWriteResponse> {
        let write = request.get_ref();
        let exec = self.exec(&request, &write.task_id, &write.exec_id)?;
        exec.write(write.offset, &write.data, write.eof).await?;
        Ok(Response::new(TaskExecStdinWriteResponse {}))
    }

    async fn task_exec_stdin_write_stream(
        &self,
        request: Request<Streaming<TaskExecStdinWriteStreamRequest>>,
    ) -> Answer<TaskExecStdinWriteStreamResponse> {
        if !self.0.options.stdin_streams {
            return Err(Status::unimplemented("TaskExecStdinWriteStream"));
        }
        let (metadata, extensions, mut messages) = request.into_parts();
        let request = Request::from_parts(metadata, extensions, ());
        let first = messages.message().await?.and_then(|message| message.payload);
        let Some(Payload::Start(start)) = first else {
            return Err(Status::invalid_argument("a stream begins with `start`"));
        };
        let exec = self.exec(&request, &start.task_id, &start.exec_id)?;
        let mut evictions = exec.evictions();
        let mut offset = start.offset;
        let all = async {
            while let Some(message) = messages.message().await? {
                match message.payload {
                    Some(Payload::Data(data)) => {
                        exec.write(offset, &data, false).await?;
                        offset += data.len() as u64;
                    }
                    Some(Payload::End(_)) => {
                        exec.write(offset, &[], true).await?;
                        return Ok(Response::new(TaskExecStdinWriteStreamResponse {}));
                    }
                    Some(Payload::Start(_)) | None => {
                        return Err(Status::invalid_argument("a stream has one `start`"));
                    }
                }
            }
            // What ends without `end` has broken, and may be resumed.
            Err(Status::aborted("the stream ended without `end`"))
        };
        tokio::select! {
            done = all => done,
            _ = evictions.changed() => Err(Status::aborted("evicted by TaskExecStdinStatus")),
        }
    }

    async fn task_exec_stdin_status(
        &self,
        request: Request<TaskExecStdinStatusRequest>,
    ) -> Answer<TaskExecStdinStatusResponse> {
        let asked = request.get_ref();
        let exec = self.exec(&request, &asked.task_id, &asked.exec_id)?;
        let (num_bytes_written, closed) = exec.stdin_status().await;
        Ok(Response::new(TaskExecStdinStatusResponse { num_bytes_written, closed }))
    }

    async fn task_exec_wait(
        &self,
        request: Request<TaskExecWaitRequest>,
    ) -> Answer<TaskExecWaitResponse> {
        use task_exec_wait_response::ExitStatus;
        let asked = request.get_ref();
        let exec = self.exec(&request, &asked.task_id, &asked.exec_id)?;
        let status = match exec.wait().await {
            Exit::Code(code) => ExitStatus::Code(code),
            Exit::Signal(signal) => ExitStatus::Signal(signal),
        };
        Ok(Response::new(TaskExecWaitResponse { exit_status: Some(status) }))
    }

    async fn task_exec_poll(
        &self,
        request: Request<TaskExecPollRequest>,
    ) -> Answer<TaskExecPollResponse> {
        use task_exec_poll_response::ExitStatus;
        let asked = request.get_ref();
        let exec = self.exec(&request, &asked.task_id, &asked.exec_id)?;
        let exit_status = exec.poll().map(|exit| match exit {
            Exit::Code(code) => ExitStatus::Code(code),
            Exit::Signal(signal) => ExitStatus::Signal(signal),
        });
        Ok(Response::new(TaskExecPollResponse { exit_status }))
    }

    async fn task_snapshot_filesystem(
        &self,
        request: Request<TaskSnapshotFilesystemRequest>,
    ) -> Answer<TaskSnapshotFilesystemResponse> {
        let asked = request.get_ref();
        let sandbox = self.task(&request, &asked.task_id)?;
        if !sandbox.is_running() {
            return Err(Status::not_found(format!("Task {:?} has finished", asked.task_id)));
        }
        if asked.ttl_seconds.is_none() || asked.snapshot_id.is_empty() {
            return Err(Status::invalid_argument("snapshot_id and ttl_seconds must be set"));
        }
        let key = format!("snapshot {} {}", asked.task_id, asked.snapshot_id);
        let mut made = self.0.made.lock().await;
        if let Some(image_id) = made.get(&key).cloned() {
            return Ok(Response::new(TaskSnapshotFilesystemResponse { image_id }));
        }
        let image_id = self.0.snapshot(&sandbox.root, &sandbox.image)?.id.clone();
        made.insert(key, image_id.clone());
        Ok(Response::new(TaskSnapshotFilesystemResponse { image_id }))
    }
}
