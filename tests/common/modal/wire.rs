//! Connections to the stand-in: each goes through a relay that can delay its bytes and cut it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

/// What may be under way in one direction of a connection.
const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;
const CHUNK: usize = 64 << 10;

/// What all connections of a stand-in have in common.
#[derive(Debug)]
pub(crate) struct Network {
    round_trip: Duration,
    /// Counts up when all connections are cut.
    cuts: watch::Sender<u64>,
    is_down: AtomicBool,
    accepted: AtomicUsize,
}

impl Network {
    pub(crate) fn new(round_trip: Duration) -> Self {
        let (cuts, _) = watch::channel(0);
        Self { round_trip, cuts, is_down: AtomicBool::new(false), accepted: AtomicUsize::new(0) }
    }

    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|count| *count += 1);
    }

    pub(crate) fn refuse(&self, on: bool) {
        self.is_down.store(on, Ordering::SeqCst);
    }

    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Gives the server's end of every connection to this listener, until nobody takes them.
    pub(crate) fn listen(
        self: &Arc<Self>,
        listener: std::net::TcpListener,
    ) -> io::Result<(SocketAddr, mpsc::Receiver<DuplexStream>)> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = TcpListener::from_std(listener)?;
        let (give, connections) = mpsc::channel(1);
        let network = self.clone();
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = give.closed() => break,
                };
                // One that is refused is closed before its first byte.
                let Ok((outer, _)) = accepted else { continue };
                if network.is_down.load(Ordering::SeqCst) {
                    continue;
                }
                network.accepted.fetch_add(1, Ordering::SeqCst);
                let _ = outer.set_nodelay(true);
                let (inner, server) = tokio::io::duplex(CHUNK);
                tokio::spawn(relay(outer, inner, network.round_trip, network.cuts.subscribe()));
                if give.send(server).await.is_err() {
                    break;
                }
            }
        });
        Ok((address, connections))
    }
}

/// Carries bytes both ways until both ends are done, or the network is cut.
async fn relay(
    outer: impl AsyncRead + AsyncWrite,
    inner: impl AsyncRead + AsyncWrite,
    round_trip: Duration,
    mut cuts: watch::Receiver<u64>,
) {
    let (outer_read, outer_write) = tokio::io::split(outer);
    let (inner_read, inner_write) = tokio::io::split(inner);
    let both = async {
        // Loopback connects in no time; a real connection takes a round trip.
        tokio::time::sleep(round_trip).await;
        tokio::join!(
            carry(outer_read, inner_write, round_trip / 2),
            carry(inner_read, outer_write, round_trip / 2),
        )
    };
    tokio::select! {
        _ = both => {}
        _ = cuts.changed() => {}
    }
}

/// Carries bytes one way, each `delay` late, in order.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    delay: Duration,
) -> io::Result<()> {
    if delay.is_zero() {
        tokio::io::copy(&mut from, &mut to).await?;
        return to.shutdown().await;
    }
    let room = Semaphore::new(IN_FLIGHT_BYTES_MAX);
    let (give, mut take) = mpsc::unbounded_channel::<(Instant, Bytes)>();
    let read = async {
        let give = give;
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            let count = from.read_buf(&mut buffer).await?;
            if count == 0 {
                return io::Result::Ok(());
            }
            let permits = u32::try_from(count).unwrap_or(u32::MAX);
            room.acquire_many(permits).await.map_err(io::Error::other)?.forget();
            if give.send((Instant::now() + delay, buffer.split().freeze())).is_err() {
                return Ok(());
            }
        }
    };
    let write = async {
        while let Some((at, bytes)) = take.recv().await {
            tokio::time::sleep_until(at).await;
            to.write_all(&bytes).await?;
            room.add_permits(bytes.len());
        }
        to.shutdown().await
    };
    let (read, written) = tokio::join!(read, write);
    read.and(written)
}
