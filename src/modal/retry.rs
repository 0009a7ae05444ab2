//! When a call is made again: the rules of Modal's own clients.

use std::future::Future;
use std::time::{Duration, Instant};

use tonic::{Code, Status};

use super::fault::Fault;

/// How a kind of call is made again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// The pause before the second try; each one is twice as long as that before it.
    first: Duration,
    /// The longest pause.
    most: Duration,
    /// Tries after the first; nothing: for as long as there is time.
    retries: Option<u32>,
    /// How long a try may take.
    attempt: Duration,
    /// How long all of it may take, throttling not counted.
    total: Option<Duration>,
    /// How long throttling may hold it up, in all.
    throttle: Option<Duration>,
}

impl Rules {
    /// Of calls to the control plane.
    pub(super) fn control(throttle: Option<Duration>) -> Self {
        Self {
            first: Duration::from_millis(100),
            most: Duration::from_secs(1),
            retries: Some(3),
            attempt: Duration::from_secs(120),
            total: None,
            throttle,
        }
    }

    /// Of calls to a worker.
    pub(super) fn router(throttle: Option<Duration>) -> Self {
        Self {
            first: Duration::from_millis(10),
            most: Duration::from_secs(10),
            retries: Some(10),
            attempt: Duration::from_secs(60),
            total: None,
            throttle,
        }
    }

    /// These, but tries that are so long.
    pub(super) fn attempt(self, attempt: Duration) -> Self {
        Self { attempt, ..self }
    }

    /// These, but one try, which isn't waited for when it's throttled.
    pub(super) fn once(self) -> Self {
        Self { retries: Some(0), throttle: Some(Duration::ZERO), ..self }
    }

    /// These, but for so long, however often.
    pub(super) fn patient(self, total: Duration) -> Self {
        Self { retries: None, total: Some(total), ..self }
    }
}

/// Which try it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    pub(super) retries: u32,
    pub(super) throttled: u32,
    pub(super) since: Instant,
}

/// Pauses between tries.
#[derive(Debug)]
pub(super) struct Persistence {
    rules: Rules,
    pause: Duration,
    pub(super) attempt: Attempt,
    /// When the first of the tries failed that have not got anywhere.
    fruitless_since: Option<Instant>,
    throttled: Duration,
    /// Whether the last thing that was done about a fault was to get another pass.
    pub(super) is_refreshed: bool,
}

impl Persistence {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            pause: rules.first,
            attempt: Attempt { retries: 0, throttled: 0, since: Instant::now() },
            fruitless_since: None,
            throttled: Duration::ZERO,
            is_refreshed: false,
        }
    }

    /// The last try has got somewhere: what fails from now on is another failure.
    pub(super) fn progressed(&mut self) {
        self.pause = self.rules.first;
        self.attempt.retries = 0;
        self.fruitless_since = None;
        self.is_refreshed = false;
    }

    /// How long to wait before the next try; nothing: the fault is final.
    pub(super) fn pause(&mut self, fault: &Fault) -> Option<Duration> {
        if let Some(after) = fault.retry_after {
            let waited = self.throttled + after;
            if self.rules.throttle.is_some_and(|most| waited > most) {
                return None;
            }
            self.throttled = waited;
            self.attempt.throttled += 1;
            return Some(after);
        }
        // What worked for an hour before it broke has not been tried for an hour.
        let since = *self.fruitless_since.get_or_insert_with(Instant::now);
        let is_over = match (self.rules.retries, self.rules.total) {
            (Some(retries), _) if self.attempt.retries >= retries => true,
            (_, Some(total)) => since.elapsed() + self.pause >= total,
            _ => false,
        };
        if !fault.is_transient() || is_over {
            return None;
        }
        self.attempt.retries += 1;
        let pause = self.pause;
        self.pause = (self.pause * 2).min(self.rules.most);
        Some(pause)
    }
}

/// A call without an end that lasted for so long before it broke was one that worked.
pub(super) const WORKED_TIME: Duration = Duration::from_secs(1);

/// Makes a call until it works, or doesn't for good.
///
/// # Errors
///
/// The last fault.
pub(super) async fn persist<T, F>(
    rules: Rules,
    mut call: impl FnMut(Attempt) -> F,
) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut persistence = Persistence::new(rules);
    loop {
        let call = call(persistence.attempt);
        let fault = match tokio::time::timeout(rules.attempt, call).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(status)) => Fault::from(status),
            Err(_) => {
                Fault::new(Code::DeadlineExceeded, format!("no answer within {:?}", rules.attempt))
            }
        };
        match persistence.pause(&fault) {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return Err(fault),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable() -> Fault {
        Fault::new(Code::Unavailable, "gone")
    }

    #[test]
    fn pauses_grow_and_end() {
        let mut control = Persistence::new(Rules::control(None));
        let pauses: Vec<_> = std::iter::from_fn(|| control.pause(&unavailable())).collect();
        assert_eq!(pauses, [100, 200, 400].map(Duration::from_millis));
        let mut router = Persistence::new(Rules::router(None));
        let pauses: Vec<_> = std::iter::from_fn(|| router.pause(&unavailable())).collect();
        assert_eq!(pauses.len(), 10);
        assert_eq!(pauses[..3], [10, 20, 40].map(Duration::from_millis));
        router.progressed();
        assert_eq!(router.pause(&unavailable()), Some(Duration::from_millis(10)));
    }

    #[test]
    fn patience_begins_with_the_first_fault() {
        let wait = || std::thread::sleep(Duration::from_millis(60));
        let rules = Rules::router(None).patient(Duration::from_millis(50));
        let mut persistence = Persistence::new(rules);
        wait();
        assert!(persistence.pause(&unavailable()).is_some());
        wait();
        assert!(persistence.pause(&unavailable()).is_none());
        persistence.progressed();
        assert!(persistence.pause(&unavailable()).is_some());
    }

    #[test]
    fn what_can_not_work_is_not_tried_again() {
        for code in [Code::NotFound, Code::InvalidArgument, Code::ResourceExhausted, Code::Aborted]
        {
            let mut persistence = Persistence::new(Rules::control(None));
            assert_eq!(persistence.pause(&Fault::new(code, "no")), None, "{code:?}");
        }
    }

    #[test]
    fn a_throttled_call_waits_as_long_as_modal_says_and_no_longer_than_allowed() {
        let after = Duration::from_secs(4);
        let throttled =
            Fault { retry_after: Some(after), ..Fault::new(Code::ResourceExhausted, "") };
        let mut free = Persistence::new(Rules::control(None));
        assert!((0..50).all(|_| free.pause(&throttled) == Some(after)));
        let mut bound = Persistence::new(Rules::control(Some(Duration::from_secs(10))));
        let pauses: Vec<_> = std::iter::from_fn(|| bound.pause(&throttled)).collect();
        assert_eq!(pauses, [after; 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_made_again_until_it_works() {
        let mut seen = Vec::new();
        let done = persist(Rules::control(None), |attempt| {
            seen.push(attempt.retries);
            let retries = attempt.retries;
            async move { if retries < 2 { Err(Status::unknown("")) } else { Ok(retries) } }
        });
        assert_eq!(done.await, Ok(2));
        assert_eq!(seen, [0, 1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_an_answer_is_given_up() {
        let rules = Rules::control(None).attempt(Duration::from_secs(5));
        let silent = || std::future::pending::<Result<(), Status>>();
        let fault = persist(rules, |_| silent()).await.unwrap_err();
        assert_eq!(fault.code, Code::DeadlineExceeded);
    }
}
