//! One container: from its start to its removal.

use std::sync::Arc;

use async_trait::async_trait;
use bollard::models::ContainerCreateBody;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::engine::Engine;
use super::fault::Fault;
use super::streams::{self, Seen};
use super::verdict::{Said, Subject};
use crate::error::{Error, Result};
use crate::process::{Life, Started, Surroundings};

/// A container that was created.
pub(super) struct Container {
    engine: Arc<Engine>,
    id: String,
    /// Where the removal is done when nobody can wait for it.
    runtime: Handle,
    is_ended: bool,
    seen: Option<Arc<Seen>>,
    subject: Subject,
}

impl Container {
    /// Creates a container, attaches to it and starts it, in this order: what it says first is seen.
    ///
    /// The work is done by a task of its own, which can't be dropped half-way: what it has started when
    /// nobody waits for it any more is dropped as a whole, and removed.
    pub(super) async fn start(
        engine: Arc<Engine>,
        session: &str,
        body: ContainerCreateBody,
        subject: Subject,
        surroundings: Surroundings,
    ) -> Result<Started> {
        let name = format!("kaa-{session}");
        let (send, receive) = oneshot::channel();
        tokio::spawn(async move {
            let started = Self::begin(engine, &name, body, subject, surroundings).await;
            drop(send.send(started));
        });
        receive.await.unwrap_or_else(|_| {
            Err(Error::unavailable("a container", "the runtime that was to start it shut down"))
        })
    }

    async fn begin(
        engine: Arc<Engine>,
        name: &str,
        body: ContainerCreateBody,
        subject: Subject,
        surroundings: Surroundings,
    ) -> Result<Started> {
        let id = match engine.create(name, body).await {
            Ok(id) => id,
            Err(fault) => {
                // It may have been created all the same; if not, there is nothing to remove.
                if !matches!(fault, Fault::Refused { .. }) {
                    drop(engine.remove(name).await);
                }
                return Err(subject.not_started(fault));
            }
        };
        let runtime = Handle::current();
        let mut container = Self { engine, id, runtime, is_ended: false, seen: None, subject };
        let attached = async {
            let attached = container.engine.attach(&container.id).await?;
            container.engine.start(&container.id).await?;
            Ok(attached)
        };
        match attached.await {
            Ok(attached) => {
                let (stdout, stdin, seen) = streams::split(attached);
                container.seen = Some(seen);
                let (reader, writer) = (Box::new(stdout), Box::new(stdin));
                let life = Box::new(container);
                Ok(Started { reader, writer, life, surroundings, calls: None })
            }
            Err(fault) => {
                // What can't be removed now is removed with the leftovers.
                drop(container.close().await);
                Err(container.subject.not_started(fault))
            }
        }
    }
}

#[async_trait]
impl Life for Container {
    fn kill(&mut self) {
        if std::mem::replace(&mut self.is_ended, true) {
            return;
        }
        let (engine, id) = (Arc::clone(&self.engine), std::mem::take(&mut self.id));
        // With the runtime at its end the task is never run: then the container ends with the
        // connection, which the owner of the streams drops, and the engine removes it.
        self.runtime.spawn(async move { drop(engine.remove(&id).await) });
    }

    async fn close(&mut self) -> Result<()> {
        if self.is_ended {
            return Ok(());
        }
        let removed = self.engine.remove(&self.id).await;
        self.is_ended = removed.is_ok();
        removed.map_err(|fault| fault.of_engine(self.engine.host()))
    }

    async fn autopsy(&mut self) -> Error {
        let evidence = self.engine.evidence(&self.id).await;
        let (has_stdout, stderr) = match &self.seen {
            Some(seen) => (seen.has_stdout(), seen.stderr()),
            None => (false, String::new()),
        };
        self.subject.verdict(evidence, Said { has_stdout, stderr: &stderr })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill();
    }
}
