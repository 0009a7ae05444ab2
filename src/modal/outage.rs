//! What waits for the end of an outage, where giving up would cost more.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::fault::Fault;

/// The pause between calls, each of which has tries of its own; it doubles up to the most.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(20);

/// Whether a fault may be gone later.
pub(super) fn may_pass(fault: &Fault) -> bool {
    fault.is_transient() || fault.retry_after.is_some()
}

/// Makes a call again and again while Modal can't be reached, for so long at most.
///
/// # Errors
///
/// The last fault.
pub(super) async fn outlast<T, F>(time: Duration, mut call: impl FnMut() -> F) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let (since, mut pause) = (Instant::now(), PAUSE);
    loop {
        match call().await {
            Err(fault) if may_pass(&fault) && since.elapsed() + pause < time => {
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_outlasted_and_a_refusal_is_not() {
        for (code, time, expected) in [
            (Code::Unavailable, 600, Ok(300..330)),
            (Code::Unavailable, 60, Err(30..60)),
            (Code::NotFound, 600, Err(0..1)),
        ] {
            let since = Instant::now();
            let call = || async {
                match since.elapsed() {
                    passed if passed < Duration::from_secs(300) => Err(Fault::new(code, "")),
                    _ => Ok(()),
                }
            };
            let done = outlast(Duration::from_secs(time), call).await;
            let (is_done, range) = match expected {
                Ok(range) => (true, range),
                Err(range) => (false, range),
            };
            assert_eq!(done.is_ok(), is_done, "{code:?} {time}");
            assert!(range.contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
        }
    }
}
