//! What every call passes before it is answered: counting, recording, injected faults, credentials.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Frame;
use prost::Message;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};

use super::proto::client::{RpcRetryPolicy, RpcStatus, RpcStatusDetail};
use super::world::World;

const CONTROL: &str = "/modal.client.ModalClient/";
const ROUTER: &str = "/modal.task_command_router.TaskCommandRouter/";

/// What goes wrong with a call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// It fails before anything happens.
    Before(Code),
    /// It's done, and the response is lost.
    After(Code),
    /// A stream, in either direction, breaks once at least so many bytes have passed.
    Mid { after_bytes: usize },
    /// Throttled: to be tried again after so many seconds.
    Throttle(f32),
    /// The token is no longer taken: this one, whatever it says about itself.
    Unauthenticated,
    /// It's answered that much later.
    Delay(Duration),
}

/// A call as it came.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    /// The name of the RPC, such as `SandboxCreateV2`.
    pub(crate) rpc: String,
    pub(crate) metadata: Vec<(String, String)>,
    /// The raw messages, of which only client streams have more than one.
    pub(crate) messages: Vec<Bytes>,
}

/// A call that is being recorded: its body comes in pieces.
struct Recording {
    rpc: String,
    metadata: Vec<(String, String)>,
    body: Arc<Mutex<Vec<u8>>>,
}

/// The calls so far, and the faults to come.
#[derive(Default)]
pub(crate) struct Calls {
    counts: Mutex<HashMap<String, usize>>,
    faults: Mutex<HashMap<String, VecDeque<Fault>>>,
    log: Mutex<Vec<Recording>>,
}

impl Calls {
    pub(crate) fn count(&self, rpc: &str) -> usize {
        self.counts.lock().unwrap().get(rpc).copied().unwrap_or(0)
    }

    pub(crate) fn add_fault(&self, rpc: &str, fault: Fault) {
        self.faults.lock().unwrap().entry(rpc.to_owned()).or_default().push_back(fault);
    }

    pub(crate) fn faults_left(&self) -> usize {
        self.faults.lock().unwrap().values().map(VecDeque::len).sum()
    }

    pub(crate) fn log(&self) -> Vec<Recorded> {
        let log = self.log.lock().unwrap();
        let recorded = |call: &Recording| Recorded {
            rpc: call.rpc.clone(),
            metadata: call.metadata.clone(),
            messages: messages(&call.body.lock().unwrap()),
        };
        log.iter().map(recorded).collect()
    }

    fn begin(&self, rpc: &str) -> Option<Fault> {
        *self.counts.lock().unwrap().entry(rpc.to_owned()).or_default() += 1;
        self.faults.lock().unwrap().get_mut(rpc)?.pop_front()
    }

    /// Keeps what passes of the body, as it passes.
    fn record(&self, rpc: &str, request: Request<Body>) -> Request<Body> {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let headers = request.headers().iter();
        let metadata = headers.map(|(name, value)| (name.to_string(), text(value.as_bytes())));
        let body = Arc::<Mutex<Vec<u8>>>::default();
        self.log.lock().unwrap().push(Recording {
            rpc: rpc.to_owned(),
            metadata: metadata.collect(),
            body: body.clone(),
        });
        request.map(|inner| {
            Body::new(inner.map_frame(move |frame: Frame<Bytes>| {
                if let Some(data) = frame.data_ref() {
                    body.lock().unwrap().extend_from_slice(data);
                }
                frame
            }))
        })
    }
}

/// The messages of a body: each has a byte for compression, which nobody asked for, and its length.
fn messages(mut body: &[u8]) -> Vec<Bytes> {
    let mut found = Vec::new();
    while let Some((head, rest)) = body.split_at_checked(5) {
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let Some((message, rest)) = rest.split_at_checked(length) else { break };
        assert_eq!(head[0], 0, "a compressed message");
        found.push(Bytes::copy_from_slice(message));
        body = rest;
    }
    found
}

/// RESOURCE_EXHAUSTED with Modal's word on when to try again.
fn throttled(seconds: f32) -> Status {
    let message = "throttled by the stand-in";
    let policy = RpcRetryPolicy { retry_after_secs: seconds };
    let details = RpcStatusDetail {
        type_url: "type.googleapis.com/modal.client.RPCRetryPolicy".into(),
        value: policy.encode_to_vec().into(),
    };
    let code = Code::ResourceExhausted;
    let status = RpcStatus { code: code as i32, message: message.into(), details: vec![details] };
    Status::with_details(code, message, status.encode_to_vec().into())
}

/// A body that breaks.
struct Breaking {
    inner: Body,
    left: usize,
    is_broken: bool,
    /// A response breaks with trailers, a request with an error.
    is_response: bool,
}

impl tonic::codegen::Body for Breaking {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_broken {
            return Poll::Ready(None);
        }
        if self.left == 0 {
            self.is_broken = true;
            let status = Status::unavailable("the stream was broken by the stand-in");
            if !self.is_response {
                return Poll::Ready(Some(Err(status)));
            }
            let mut trailers = HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.left = self.left.saturating_sub(data.len());
        }
        polled
    }
}

fn breaking(inner: Body, after_bytes: usize, is_response: bool) -> Body {
    Body::new(Breaking { inner, left: after_bytes, is_broken: false, is_response })
}

/// The service around both of Modal's.
#[derive(Clone)]
pub(crate) struct Gate<S> {
    inner: S,
    world: Arc<World>,
}

impl<S> Gate<S> {
    pub(crate) fn new(inner: S, world: Arc<World>) -> Self {
        Self { inner, world }
    }
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that was polled is the one that is ready.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let world = self.world.clone();
        Box::pin(async move {
            let path = request.uri().path();
            let rpc = path.rsplit('/').next().unwrap_or_default().to_owned();
            let fault = world.calls.begin(&rpc);
            let request = match world.options.record {
                true => world.calls.record(&rpc, request),
                false => request,
            };
            let mut request = match admitted(&world, request) {
                Ok(request) => request,
                Err(status) => return Ok(status.into_http()),
            };
            match fault {
                Some(Fault::Before(code)) => return Ok(injected(code).into_http()),
                Some(Fault::Throttle(seconds)) => return Ok(throttled(seconds).into_http()),
                Some(Fault::Unauthenticated) => {
                    return Ok(Status::unauthenticated("the token was revoked").into_http());
                }
                Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
                Some(Fault::Mid { after_bytes }) if rpc == "TaskExecStdinWriteStream" => {
                    request = request.map(|body| breaking(body, after_bytes, false));
                }
                Some(Fault::After(_) | Fault::Mid { .. }) | None => {}
            }
            let response = inner.call(request).await?;
            Ok(match fault {
                Some(Fault::After(code)) => injected(code).into_http(),
                Some(Fault::Mid { after_bytes }) if rpc != "TaskExecStdinWriteStream" => {
                    response.map(|body| breaking(body, after_bytes, true))
                }
                _ => response,
            })
        })
    }
}

fn injected(code: Code) -> Status {
    Status::new(code, "injected by the stand-in")
}

/// Checks who asks. What the token of a worker is for goes on with the request.
fn admitted(world: &World, mut request: Request<Body>) -> Result<Request<Body>, Status> {
    let headers = request.headers();
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let path = request.uri().path();
    if let Some(rpc) = path.strip_prefix(CONTROL) {
        for name in ["x-modal-client-version", "x-modal-client-type"] {
            if header(name).is_none_or(str::is_empty) {
                return Err(Status::failed_precondition(format!("{name} is required")));
            }
        }
        let (id, secret) = (header("x-modal-token-id"), header("x-modal-token-secret"));
        if id != Some(&world.options.token_id) || secret != Some(&world.options.token_secret) {
            return Err(Status::unauthenticated("Token ID or secret is invalid"));
        }
        if rpc.ends_with("V2") || rpc == "SandboxGetCommandRouterAccess" {
            let token = header("x-modal-auth-token").unwrap_or_default();
            world.tokens.check(token).ok_or_else(|| {
                Status::unauthenticated("x-modal-auth-token is missing, unknown or expired")
            })?;
        }
    } else if path.starts_with(ROUTER) {
        let bearer = header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let token = world.tokens.check(bearer.unwrap_or_default());
        let task = token.flatten().ok_or_else(|| {
            Status::unauthenticated("the bearer token is missing, unknown or expired")
        })?;
        request.extensions_mut().insert(ForTask(task));
    }
    Ok(request)
}

/// The task that a worker's token is for.
#[derive(Debug, Clone)]
pub(crate) struct ForTask(pub(crate) String);
