//! Server of RLM's LM handler protocol.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::slice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use serde_json::{Map, Value as Json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::{self, Sleep};

use super::wire::{AnswerJson, Asked, AskedPrompts, Reply, answer_bytes, read_object};
use super::{LmCompletion, LmError, LmHandler, LmKind, LmRequest, LmToken, in_batch};
use crate::error::{Error, Result};
use crate::frame;

/// The header's range.
const FRAME_BYTES_MAX: usize = u32::MAX as usize;
/// How long a client that has its reply may take to close.
const LINGER: Duration = Duration::from_secs(2);
/// Between two tries to accept when the system has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What is thrown away at once of what nobody asked for.
const DISCARD_BYTES: usize = 16 << 10;

/// What an [`LmServer`] allows; the limits are in its table.
#[derive(Debug, Clone)]
pub struct LmServerOptions {
    /// What every request must carry; without one, only loopback addresses can be bound.
    pub token: Option<LmToken>,
    /// Bytes of a request, without the frame's header.
    pub request_bytes_max: usize,
    /// Bytes of requests, of all connections together, that are arriving or not yet read.
    pub arriving_bytes_max: usize,
    /// Bytes of the answers in a reply as JSON, without the prompts that it repeats.
    pub reply_bytes_max: usize,
    /// Time from the connection to the last byte of its request.
    pub receive_timeout: Duration,
    /// Time that the handler has for a request, a batch as a whole. RLM's clients give up after
    /// 300 s, so less than that lets them have what there is.
    pub answer_timeout: Duration,
    /// Time from the first byte of the reply to the last.
    pub send_timeout: Duration,
    /// Connections at once.
    pub connections_max: usize,
    /// Prompts in a request.
    pub prompts_max: usize,
    /// Prompts of one batch that are under way at once.
    pub batch_concurrency: usize,
}

impl Default for LmServerOptions {
    fn default() -> Self {
        Self {
            token: None,
            request_bytes_max: 64 << 20,
            arriving_bytes_max: 1 << 30,
            reply_bytes_max: 64 << 20,
            receive_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(290),
            send_timeout: Duration::from_secs(30),
            connections_max: 256,
            prompts_max: 10_000,
            batch_concurrency: 16,
        }
    }
}

impl LmServerOptions {
    fn validate(&self) -> Result<()> {
        for (name, is_zero) in [
            ("request_bytes_max", self.request_bytes_max == 0),
            ("reply_bytes_max", self.reply_bytes_max == 0),
            ("receive_timeout", self.receive_timeout.is_zero()),
            ("answer_timeout", self.answer_timeout.is_zero()),
            ("send_timeout", self.send_timeout.is_zero()),
            ("connections_max", self.connections_max == 0),
            ("prompts_max", self.prompts_max == 0),
            ("batch_concurrency", self.batch_concurrency == 0),
        ] {
            if is_zero {
                return Err(Error::invalid(name, "it must be more than 0"));
            }
        }
        if self.arriving_bytes_max < self.request_bytes_max {
            let reason = format!(
                "{} bytes are less than one request may have; take {} or more",
                self.arriving_bytes_max, self.request_bytes_max
            );
            return Err(Error::invalid("arriving_bytes_max", reason));
        }
        Ok(())
    }
}

/// The LM handler as a TCP server: what `rlm.core.lm_handler.LMHandler` is in RLM.
///
/// RLM's environments, its `send_lm_request`, and [`SocketHandler`](super::SocketHandler) can ask
/// it. Each connection carries one request and one reply; what follows the request is thrown away.
/// Prompts are texts, messages or lists of messages; every request goes to the handler as
/// [`LmKind::Llm`], since the wire doesn't tell. Half of a surrogate pair becomes U+FFFD.
///
/// The prompts of a batch go to the handler as batches of one each, so that what is answered is kept
/// whatever becomes of the others: when the time is over, or the reply is full, only the slots that
/// it concerns hold an error. A [`SocketHandler`](super::SocketHandler) behind the server therefore
/// opens a connection for each prompt.
///
/// | limit, a field of [`LmServerOptions`] | default | beyond it |
/// |---|---|---|
/// | `request_bytes_max`, checked before memory is taken for them | 64 MiB | error reply |
/// | `arriving_bytes_max`, of all requests before they are read and their token is known | 1 GiB | they wait, within `receive_timeout` |
/// | `reply_bytes_max`, of the answers in a reply, without the prompts that it repeats | 64 MiB | error reply; in a batch, an error for each answer that has no room |
/// | `receive_timeout`, for the whole request | 30 s | error reply |
/// | `answer_timeout`, for the handler | 290 s | calls are dropped, error reply; in a batch, an error for each prompt that has no answer |
/// | `send_timeout`, for the whole reply | 30 s | the connection is closed |
/// | `connections_max` | 256 | they wait in the system's queue until one ends |
/// | `prompts_max` in a request | 10 000 | error reply |
/// | `batch_concurrency`, prompts of a batch at once | 16 | they wait |
/// | values in the JSON of a request, fixed | 262 144 | error reply |
/// | the client's closing once it has its reply, fixed | 2 s | the connection is closed |
///
/// A client whose frame is too large may go on sending, to nobody, until `receive_timeout` ends.
/// Clients without the token can make it hold about twice `arriving_bytes_max`. Those that may ask,
/// `connections_max` times their requests and twice their replies: lower these limits where there
/// are many such clients.
///
/// # Who may ask
///
/// Anyone on this machine, unless there is a [`token`](LmServerOptions::token): it then has to be
/// in the request's object as `"token"`. RLM's own clients can't send one. Addresses that other
/// machines reach can't be bound without a token. Nothing is encrypted.
///
/// # Cancellation
///
/// A client that closes its connection cancels its call: the handler's future is dropped. TCP
/// doesn't tell a closed connection from one whose client only stopped sending, so a client must
/// keep its sending side open until it has its reply, as RLM's and Kaa's do.
///
/// # Example
///
/// ```
/// use std::sync::Arc;
/// use kaa::lm::{LmHandler, LmKind, LmRequest, LmServer, LmServerOptions, Prompt};
/// use kaa::lm::{ScriptedHandler, SocketHandler};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let echo = Arc::new(ScriptedHandler::echo());
/// let server = LmServer::bind("127.0.0.1:0", echo, LmServerOptions::default()).await?;
/// let client = SocketHandler::new(server.local_addr().to_string())?;
/// let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
/// let serving = tokio::spawn(server.serve(async { drop(stopped.await) }));
///
/// let prompt = Prompt::Text("hi".into());
/// let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
/// assert_eq!(client.complete(&request).await?.response, "hi");
///
/// drop(stop);
/// serving.await?;
/// # Ok(())
/// # }
/// ```
pub struct LmServer {
    listener: TcpListener,
    address: SocketAddr,
    desk: Arc<Desk>,
}

impl fmt::Debug for LmServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LmServer")
            .field("address", &self.address)
            .field("options", &self.desk.options)
            .finish()
    }
}

impl LmServer {
    /// Listens at `address`, `HOST:PORT`; port 0 lets the system choose. Connections wait until
    /// [`serve`](Self::serve) is called.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `address` is of another form, if it is no loopback address and there
    /// is no token, or if a limit is 0; [`Error::Io`] if the system refuses.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use kaa::lm::{LmServer, LmServerOptions, ScriptedHandler};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let echo = Arc::new(ScriptedHandler::echo());
    /// let options = LmServerOptions::default();
    /// let error = LmServer::bind("0.0.0.0:0", echo, options).await.unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "listen address \"0.0.0.0:0\": other machines may reach 0.0.0.0:0; set a token, or \
    ///      listen at 127.0.0.1"
    /// );
    /// # }
    /// ```
    pub async fn bind(
        address: &str,
        handler: Arc<dyn LmHandler>,
        options: LmServerOptions,
    ) -> Result<Self> {
        options.validate()?;
        let what = format!("listen address {address:?}");
        let addresses: Vec<SocketAddr> = match lookup_host(address).await {
            Ok(addresses) => addresses.collect(),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return Err(Error::invalid(what, "write HOST:PORT, for example 127.0.0.1:0"));
            }
            Err(error) => return Err(Error::io(what, error)),
        };
        let exposed = addresses.iter().find(|one| !one.ip().to_canonical().is_loopback());
        if let (Some(exposed), None) = (exposed, &options.token) {
            let reason =
                format!("other machines may reach {exposed}; set a token, or listen at 127.0.0.1");
            return Err(Error::invalid(what, reason));
        }
        let listening = |error| Error::io(format!("listening at {address}"), error);
        let listener = TcpListener::bind(&addresses[..]).await.map_err(listening)?;
        let address = listener.local_addr().map_err(listening)?;
        let room = Semaphore::new(options.arriving_bytes_max.min(Semaphore::MAX_PERMITS));
        Ok(Self { listener, address, desk: Arc::new(Desk { handler, options, room }) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown` is ready.
    ///
    /// Calls that are under way then are dropped, and when this returns no task and no socket is
    /// left. Dropping this future does the same, except that the runtime drops the calls a little
    /// later, on its next turn. A handler that panics costs its client the reply, nothing else.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let Self { listener, desk, .. } = self;
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(_) = connections.join_next() => {}
                stream = accept(&listener), if connections.len() < desk.options.connections_max => {
                    let desk = Arc::clone(&desk);
                    // A connection that breaks is its client's affair.
                    connections.spawn(async move { drop(desk.serve(stream).await) });
                }
            }
        }
        drop(listener);
        connections.shutdown().await;
    }

    /// One connection, whatever carries it.
    #[cfg(feature = "fuzzing")]
    pub(crate) async fn serve_stream(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
    ) -> io::Result<()> {
        self.desk.serve(stream).await
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            // The client has gone, or the system is short of something: the next may succeed.
            Err(_) => time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Who answers and by what rules: what connections share.
struct Desk {
    handler: Arc<dyn LmHandler>,
    options: LmServerOptions,
    /// As many permits as bytes of requests may be here that nobody has read.
    room: Semaphore,
}

/// A request as it came, with its part of the room.
struct Arrived<'a> {
    payload: Vec<u8>,
    room: Option<SemaphorePermit<'a>>,
}

impl Desk {
    /// One connection: one request, one reply.
    async fn serve(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
        let options = &self.options;
        let received = time::timeout(options.receive_timeout, self.receive(&mut stream)).await;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut linger = LINGER;
        let reply = match received {
            Ok(Ok(request)) => tokio::select! {
                biased;
                reply = self.reply(request) => reply?,
                () = gone(&mut reader) => return Ok(()),
            },
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                // It reads no reply before it has sent all, and must not meet a reset meanwhile.
                linger = options.receive_timeout;
                Reply::Error(&error.to_string()).encode()?
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let after = options.receive_timeout;
                Reply::Error(&format!("the request was not complete after {after:?}")).encode()?
            }
        };
        time::timeout(options.send_timeout, async {
            frame::write_frame(&mut writer, &reply, FRAME_BYTES_MAX).await?;
            writer.shutdown().await
        })
        .await??;
        // Closing while bytes are unread would reset the connection, and cost the client its reply.
        let _ = time::timeout(linger, gone(&mut reader)).await;
        Ok(())
    }

    /// Waits for room once the header says how much, and takes the payload.
    async fn receive(&self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Arrived<'_>> {
        let length = frame::read_header(stream, self.options.request_bytes_max).await?;
        // RLM takes an end before the header for an empty request.
        let Some(length) = length else { return Ok(Arrived { payload: b"{}".into(), room: None }) };
        let permits = u32::try_from(length).map_err(io::Error::other)?;
        let room = Some(self.room.acquire_many(permits).await.map_err(io::Error::other)?);
        Ok(Arrived { payload: frame::read_payload(stream, length).await?, room })
    }

    async fn reply(&self, request: Arrived<'_>) -> io::Result<Vec<u8>> {
        let deadline = pin!(time::sleep(self.options.answer_timeout));
        match self.answer(request, deadline).await {
            Ok(reply) => Ok(reply),
            Err(error) => Reply::Error(&error).encode(),
        }
    }

    /// The reply to a request; an error is the text for the client.
    async fn answer(
        &self,
        request: Arrived<'_>,
        deadline: Pin<&mut Sleep>,
    ) -> Result<Vec<u8>, String> {
        let Arrived { payload, room } = request;
        let request = read_object(payload)?;
        self.authorize(&request)?;
        drop(room);
        let Asked { prompts, model, depth } = Asked::read(request, self.options.prompts_max)?;
        let ask = |prompt| LmRequest { kind: LmKind::Llm, prompt, model: model.clone(), depth };
        let reply = match prompts {
            AskedPrompts::One(prompt) => {
                let request = ask(prompt);
                tokio::select! {
                    biased;
                    reply = self.answer_one(&request) => reply?,
                    () = deadline => return Err(self.too_late()),
                }
            }
            AskedPrompts::Batch(prompts) => {
                let requests: Vec<LmRequest> = prompts.into_iter().map(ask).collect();
                self.answer_batch(&requests, deadline).await?
            }
        };
        if reply.len() > FRAME_BYTES_MAX {
            return Err(format!("the reply of {} bytes doesn't fit into a frame", reply.len()));
        }
        Ok(reply)
    }

    fn too_late(&self) -> String {
        format!("Request timed out after {:?}", self.options.answer_timeout)
    }

    fn authorize(&self, request: &Map<String, Json>) -> Result<(), String> {
        let Some(token) = &self.options.token else { return Ok(()) };
        match request.get("token").map(Json::as_str) {
            Some(Some(sent)) if token.is(sent) => Ok(()),
            Some(_) => Err("Unauthorized: the request's 'token' is not this server's".into()),
            None => Err("Unauthorized: this server wants a 'token' in each request".into()),
        }
    }

    async fn answer_one(&self, request: &LmRequest) -> Result<Vec<u8>, String> {
        let result = self.handler.complete(request).await;
        let mut room = self.options.reply_bytes_max;
        let result = self.fit(request, result, &mut room).and_then(|result| result);
        let completion = result.map_err(|error| error.message)?;
        let model = request.model.as_deref();
        let time = completion.execution_time;
        encode(&Reply::One(AnswerJson::new(model, &request.prompt, &completion, time)))
    }

    async fn answer_batch(
        &self,
        requests: &[LmRequest],
        deadline: Pin<&mut Sleep>,
    ) -> Result<Vec<u8>, String> {
        let start = Instant::now();
        let results = self.ask_all(requests, deadline).await;
        // RLM's approximation of the time that one took.
        let time = start.elapsed().div_f64(requests.len() as f64);
        // All slots of a batch name one model, those that failed too.
        let answered = || results.iter().flatten().next().map(|completion| &*completion.model);
        let own = || requests.first().and_then(|request| self.handler.model_name(request.depth));
        let named = requests.iter().find_map(|request| request.model.as_deref());
        let root_model = named.or_else(answered).or_else(own).unwrap_or_default();
        let answers =
            requests.iter().zip(&results).map(|(LmRequest { prompt, .. }, result)| match result {
                Ok(completion) => AnswerJson::new(named, prompt, completion, time),
                Err(error) => AnswerJson::failed(root_model, prompt, error),
            });
        encode(&Reply::Batch(answers.collect()))
    }

    /// Asks one by one, and keeps what is answered until the deadline and as long as there is room.
    async fn ask_all(
        &self,
        requests: &[LmRequest],
        mut deadline: Pin<&mut Sleep>,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let mut results = vec![None; requests.len()];
        let mut room = self.options.reply_bytes_max;
        let calls = requests.iter().enumerate();
        let calls = calls.map(|(i, request)| async move { (i, self.ask(request).await) });
        let calls: Vec<_> = calls.collect();
        let mut calls = stream::iter(calls).buffer_unordered(self.options.batch_concurrency);
        while let Some((i, result)) = tokio::select! {
            biased;
            next = calls.next() => next,
            () = &mut deadline => None,
        } {
            results[i] = Some(match self.fit(&requests[i], result, &mut room) {
                Ok(result) => result,
                Err(no_room) => Err(in_batch(no_room)),
            });
        }
        let late = || Err(in_batch(LmError::new(self.too_late())));
        results.into_iter().map(|result| result.unwrap_or_else(late)).collect()
    }

    /// The result, if there is room for it in the reply; an error if there isn't.
    fn fit(
        &self,
        request: &LmRequest,
        result: Result<LmCompletion, LmError>,
        room: &mut usize,
    ) -> Result<Result<LmCompletion, LmError>, LmError> {
        let bytes = answer_bytes(request.model.as_deref(), &result)
            .map_err(|error| LmError::new(unsendable(error)))?;
        let Some(left) = room.checked_sub(bytes) else {
            let max = self.options.reply_bytes_max;
            return Err(LmError::new(format!(
                "the answer of {bytes} bytes has no room: the answers in a reply have {max} at most"
            )));
        };
        *room = left;
        Ok(result)
    }

    /// Asks for a part of a batch, so that a failure is worded as the handler does it there.
    async fn ask(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let mut results = self.handler.complete_batch(slice::from_ref(request), 1).await;
        match (results.pop(), results.len()) {
            (Some(result), 0) => result,
            (None, _) => Err(in_batch(LmError::new("the handler gave no answer"))),
            (_, more) => {
                let text = format!("the handler gave {} answers to one prompt", more + 1);
                Err(in_batch(LmError::new(text)))
            }
        }
    }
}

fn encode(reply: &Reply<'_>) -> Result<Vec<u8>, String> {
    reply.encode().map_err(unsendable)
}

fn unsendable(error: io::Error) -> String {
    format!("the answer can't be sent as JSON: {error}")
}

/// Ready when the client has closed its side or the connection broke; throws away what it sends.
async fn gone(reader: &mut (impl AsyncRead + Unpin)) {
    let mut discarded = vec![0; DISCARD_BYTES];
    while let Ok(1..) = reader.read(&mut discarded).await {}
}
