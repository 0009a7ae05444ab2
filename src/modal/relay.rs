//! The second way of model calls: a broker in the sandbox, which the host asks through a tunnel.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value as Json, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::options::ModalOptions;
use super::process::SandboxProcess;
use super::router::{Command, ProcessExit};
use super::sandbox::Sandbox;
use crate::broker::{Broker, BrokerOptions, SCRIPT};
use crate::error::{Error, Result};
use crate::lm::Secret;
use crate::process::{BrokerCalls, CARRIED_BYTES_MAX, CallCarrier, Door};

/// Calls of one session that the host has at a time. Those of more threads wait in the sandbox.
const CALLS_MAX: usize = 256;
/// How long the broker may take to say that it listens.
const START_TIME: Duration = Duration::from_secs(60);
const LINE_BYTES_MAX: u64 = 4 << 10;
/// How long the end of a sandbox may take to be known after that of a process in it.
const END_TIME: Duration = Duration::from_secs(1);
/// Those who can't be served yet are told so, which takes a connection for a moment.
const CONNECTIONS_MAX: usize = 1024;
/// Bytes of calls and of answers that it keeps; and what it takes of the sandbox's memory with them, as
/// what is on its way is there more than once.
const REQUESTS_BYTES_MAX: usize = 48 << 20;
const KEPT_BYTES_MAX: usize = 16 << 20;
pub(super) const MEMORY_BYTES: u64 = 384 << 20;
/// A call ends with its cell, which has limits of its own.
const ANSWER_SECONDS_MAX: u32 = 24 * 60 * 60;

/// A broker to be.
pub(super) struct Relay {
    port: u16,
    host_token: Secret,
    guest_token: Secret,
    python: String,
    patience: Duration,
}

impl Relay {
    pub(super) fn new(port: u16, options: &ModalOptions) -> Self {
        let token = || Secret::new(format!("{:032x}", rand::random::<u128>()));
        let (host_token, guest_token) = (token(), token());
        let (python, patience) = (options.python.clone(), options.patience);
        Self { port, host_token, guest_token, python, patience }
    }

    /// What the session's worker has to know of it.
    pub(super) fn door(&self) -> Door {
        Door { port: self.port, token: self.guest_token.clone(), bytes_max: CARRIED_BYTES_MAX }
    }

    /// Starts it, and waits until the host reaches it.
    pub(super) async fn start(self, sandbox: &Sandbox) -> Result<Box<dyn CallCarrier>> {
        let process = self.launch(sandbox);
        let (mut process, url) = tokio::try_join!(process, sandbox.tunnel(self.port))?;
        let options = BrokerOptions {
            gone_after: self.patience,
            concurrency: CALLS_MAX,
            root_certificates: self.roots(sandbox),
            ..BrokerOptions::default()
        };
        let broker = Broker::connect(&url, self.host_token, options).await?;
        let sandbox = sandbox.clone();
        let ended = async move {
            let how = match process.wait().await {
                Ok(ProcessExit::Code(code)) => format!("exit code {code}"),
                Ok(ProcessExit::Signal(signal)) => format!("signal {signal}"),
                Err(error) => error.to_string(),
            };
            // With its sandbox gone, the session's own process knows better why.
            tokio::time::sleep(END_TIME).await;
            if let Ok(Some(_)) = sandbox.ended().await {
                std::future::pending::<()>().await;
            }
            let mut words = String::new();
            if let Some(stderr) = process.stderr() {
                let mut stderr = stderr.take(LINE_BYTES_MAX);
                let said = stderr.read_to_string(&mut words);
                drop(tokio::time::timeout(Duration::from_secs(1), said).await);
            }
            format!("the broker in the Modal sandbox ended: {how} {}", super::fault::said(&words))
        };
        Ok(Box::new(BrokerCalls::new(broker, ended)))
    }

    fn roots(&self, sandbox: &Sandbox) -> Option<PathBuf> {
        sandbox.client().config().root_certificates.clone()
    }

    /// Starts its process, up to the moment in which it listens.
    async fn launch(&self, sandbox: &Sandbox) -> Result<SandboxProcess> {
        let command = Command {
            arguments: vec![self.python.clone(), "-c".into(), SCRIPT.into()],
            workdir: Some("/".into()),
            env: vec![("LANG".into(), "C.UTF-8".into())],
            time: None,
        };
        let mut process = sandbox.start(command, self.patience).await?;
        let settings = json!({
            "port": self.port,
            "host_token": self.host_token.expose(),
            "guest_token": self.guest_token.expose(),
            "answer_seconds_max": ANSWER_SECONDS_MAX,
            "connections_max": CONNECTIONS_MAX,
            "requests_bytes_max": REQUESTS_BYTES_MAX,
            "kept_bytes_max": KEPT_BYTES_MAX,
        });
        let failed = |reason: String| {
            let what = "the broker in the Modal sandbox";
            Error::unavailable(what, format!("{reason}; Carrier::Stdio needs none"))
        };
        let listening = async {
            let broken = |e: std::io::Error| failed(format!("its streams broke: {e}"));
            let stdin = process.stdin_mut().ok_or_else(|| failed("it has no stdin".into()))?;
            stdin.write_all(format!("{settings}\n").as_bytes()).await.map_err(broken)?;
            let mut line = String::new();
            let stdout = process.stdout().ok_or_else(|| failed("it has no stdout".into()))?;
            let stdout = stdout.take(LINE_BYTES_MAX);
            BufReader::new(stdout).read_line(&mut line).await.map_err(broken)?;
            let said: Json = serde_json::from_str(&line).unwrap_or_default();
            match (said["event"].as_str(), said["error"].as_str()) {
                (Some("listening"), _) => Ok(()),
                (_, Some(error)) => Err(failed(super::fault::said(error))),
                _ => Err(failed(format!("it said {:?}", super::fault::said(&line)))),
            }
        };
        match tokio::time::timeout(START_TIME, listening).await {
            Ok(ready) => ready.map(|()| process),
            Err(_) => Err(failed(format!("it didn't listen within {START_TIME:?}"))),
        }
    }
}
