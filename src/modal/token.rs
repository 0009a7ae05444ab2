//! The token of some minutes that calls are made with, and its replacement while the old one is good.

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::RngExt;
use tokio::time::Instant;
use tonic::Code;
use tonic::metadata::AsciiMetadataValue;

use super::channel;
use super::fault::Fault;

/// How long a token lives that doesn't say so, in seconds.
const TOKEN_LIFE: f64 = 20.0 * 60.0;
/// The part of its life after which a token is replaced, and how much later that may be, so that many
/// processes don't do it at once.
const REFRESH_AFTER: f64 = 0.5;
const REFRESH_JITTER: f64 = 0.1;
/// How long the old one is gone on with after a new one wasn't to be had; it doubles up to the most.
const REST: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(60);

/// How hard a new token is tried for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// The old one is still good.
    Someday,
    /// There is none.
    Now,
}

/// The token of the moment.
#[derive(Default)]
pub(super) struct Tokens {
    kept: Mutex<Kept>,
    /// Whose turn it is to ask for the next.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Kept {
    token: Option<Token>,
    /// How long nobody asks after the last time, which failed.
    rest: Duration,
    /// When asking failed last, and how.
    failed: Option<(Instant, Fault)>,
}

#[derive(Clone)]
struct Token {
    value: AsciiMetadataValue,
    ends: Instant,
    refresh: Instant,
}

/// What is to be done about the token.
enum State {
    Good(AsciiMetadataValue),
    /// It's good, and time for the next.
    Due(AsciiMetadataValue),
    Gone,
}

impl Tokens {
    /// The token of the moment. `ask` gets a new one. An old one is good until it ends, whatever becomes of
    /// the next, and meanwhile others don't wait for that.
    ///
    /// # Errors
    ///
    /// The fault of asking when there is none.
    pub(super) async fn get<F>(&self, ask: impl Fn(Need) -> F) -> Result<AsciiMetadataValue, Fault>
    where
        F: Future<Output = Result<String, Fault>>,
    {
        let since = Instant::now();
        let (_turn, need) = match self.state() {
            State::Good(value) => return Ok(value),
            State::Due(value) => match self.turn.try_lock() {
                Ok(turn) => (turn, Need::Someday),
                Err(_) => return Ok(value),
            },
            State::Gone => (self.turn.lock().await, Need::Now),
        };
        // It may have been another's turn just now.
        let old = match self.state() {
            State::Good(value) => return Ok(value),
            State::Due(value) => Some(value),
            State::Gone => None,
        };
        if let (None, Some(fault)) = (&old, self.failed_after(since)) {
            return Err(fault);
        }
        let new = ask(need).await.and_then(|token| Token::new(&token));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match (new, old) {
            (Ok(new), _) => {
                let value = new.value.clone();
                *kept = Kept { token: Some(new), ..Kept::default() };
                Ok(value)
            }
            (Err(fault), old) => {
                kept.rest = (kept.rest * 2).clamp(REST, REST_MAX);
                kept.failed = Some((Instant::now(), fault.clone()));
                old.ok_or(fault)
            }
        }
    }

    /// No longer gives out a token that was refused.
    pub(super) fn forget(&self, refused: &AsciiMetadataValue) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.token.as_ref().is_some_and(|token| token.value == *refused) {
            kept.token = None;
        }
    }

    fn state(&self) -> State {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let Some(token) = kept.token.as_ref().filter(|token| now < token.ends) else {
            return State::Gone;
        };
        let rests = kept.failed.as_ref().is_some_and(|(at, _)| now < *at + kept.rest);
        match now < token.refresh || rests {
            true => State::Good(token.value.clone()),
            false => State::Due(token.value.clone()),
        }
    }

    /// How asking failed, if it has since then: for who waited, that is an answer too.
    fn failed_after(&self, since: Instant) -> Option<Fault> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.failed.as_ref().filter(|(at, _)| *at > since).map(|(_, fault)| fault.clone())
    }
}

impl Token {
    fn new(token: &str) -> Result<Self, Fault> {
        let mut value = AsciiMetadataValue::try_from(token)
            .map_err(|_| Fault::new(Code::Internal, "it gave a token that is none"))?;
        value.set_sensitive(true);
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let life = channel::expiry(token).map_or(TOKEN_LIFE, |ends| ends - unix);
        // One that was given just now hasn't ended: it's the clock here that is wrong.
        let life = if life.is_finite() && life > 0.0 { life.min(1e6) } else { TOKEN_LIFE };
        let part = REFRESH_AFTER + REFRESH_JITTER * rand::rng().random::<f64>();
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs_f64(seconds);
        Ok(Self { value, ends: after(life), refresh: after(life * part) })
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;
    use tokio::time::advance;

    use super::*;

    /// A token that ends in so many seconds.
    fn token(name: &str, life: f64) -> String {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let claims = serde_json::json!({ "exp": unix + life }).to_string();
        format!("{name}.{}.s", BASE64_URL_SAFE_NO_PAD.encode(claims))
    }

    fn name(token: &AsciiMetadataValue) -> String {
        token.to_str().unwrap().split('.').next().unwrap().to_owned()
    }

    async fn with_token(life: f64) -> Tokens {
        let tokens = Tokens::default();
        tokens.get(|_| ready(Ok(token("old", life)))).await.unwrap();
        tokens
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_token_is_used_while_the_next_is_asked_for() {
        let tokens = with_token(100.0).await;
        let asked = AtomicUsize::new(0);
        let never = |need| {
            assert_eq!(need, Need::Someday);
            asked.fetch_add(1, Ordering::SeqCst);
            pending()
        };
        assert_eq!(name(&tokens.get(never).await.unwrap()), "old");
        assert_eq!(asked.load(Ordering::SeqCst), 0, "it isn't time yet");
        advance(Duration::from_secs(65)).await;
        let mut first = std::pin::pin!(tokens.get(never));
        assert!(futures_util::poll!(&mut first).is_pending());
        for _ in 0..9 {
            assert_eq!(name(&tokens.get(never).await.unwrap()), "old");
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refresh_that_failed_is_rested_from() {
        let tokens = with_token(600.0).await;
        let asked = AtomicUsize::new(0);
        let fails = |_| {
            asked.fetch_add(1, Ordering::SeqCst);
            ready(Err(Fault::new(Code::Unauthenticated, "not now")))
        };
        advance(Duration::from_secs(400)).await;
        let mut times = Vec::new();
        for second in 0..120 {
            let before = asked.load(Ordering::SeqCst);
            assert_eq!(name(&tokens.get(fails).await.unwrap()), "old");
            if asked.load(Ordering::SeqCst) > before {
                times.push(second);
            }
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!(times, [0, 5, 15, 35, 75]);
        assert_eq!(name(&tokens.get(|_| ready(Ok(token("new", 600.0)))).await.unwrap()), "old");
        advance(Duration::from_secs(60)).await;
        assert_eq!(name(&tokens.get(|_| ready(Ok(token("new", 600.0)))).await.unwrap()), "new");
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_for_a_token_share_the_failure() {
        let tokens = Tokens::default();
        let asked = AtomicUsize::new(0);
        let fails = |need| {
            assert_eq!(need, Need::Now);
            asked.fetch_add(1, Ordering::SeqCst);
            async {
                tokio::time::sleep(Duration::from_secs(5)).await;
                Err(Fault::new(Code::Unavailable, "gone"))
            }
        };
        let all = futures_util::future::join_all((0..10).map(|_| tokens.get(fails))).await;
        assert!(all.iter().all(Result::is_err));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert!(tokens.get(fails).await.is_err(), "a later one asks again");
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_was_refused_is_not_given_out_again() {
        let tokens = with_token(600.0).await;
        let new = |_| ready(Ok(token("new", 600.0)));
        let other = AsciiMetadataValue::from_static("other");
        tokens.forget(&other);
        let old = tokens.get(new).await.unwrap();
        assert_eq!(name(&old), "old");
        tokens.forget(&old);
        assert_eq!(name(&tokens.get(new).await.unwrap()), "new");
    }

    #[tokio::test(start_paused = true)]
    async fn with_a_clock_that_is_wrong_a_new_token_is_good_all_the_same() {
        let tokens = with_token(-3600.0).await;
        let kept = tokens.get(|_| pending()).await.unwrap();
        assert_eq!(name(&kept), "old");
        assert!(format!("{kept:?}").contains("Sensitive"));
    }
}
