//! Budgets: what several sessions may spend on language models together.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::{
    LmCompletion, LmError, LmHandler, LmKind, LmRequest, UsageSummary, estimated_tokens, in_batch,
    usage_of,
};
use crate::error::{Error, Result};

const CONCURRENCY_MAX: u32 = 100_000;
const WALL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// What calls may spend together. Every field is finite by default.
///
/// | field | unit | default | when it's used up |
/// |---|---|---|---|
/// | `calls` | prompts | 10,000 | `LM call limit exceeded: 9999 + 2 > 10000` |
/// | `tokens` | tokens sent and received | 50 million | `Token limit exceeded: 50,000,001 of 50,000,000 tokens` |
/// | `cost` | US dollars | 20 | `Budget exhausted (spent $20.000001 of $20.000000)` |
/// | `prompt_bytes` | bytes of prompts | 4 GiB | `Prompt limit exceeded: … of … bytes` |
/// | `concurrency` | prompts in flight | 256 | more wait |
/// | `wall` | time since the budget was made | 1 h | `Timeout exhausted (3600.1s of 3600.0s)`, also for calls in flight |
///
/// Cost counts as far as handlers know prices.
#[derive(Debug, Clone, PartialEq)]
pub struct BudgetLimits {
    /// Prompts.
    pub calls: u64,
    /// Tokens, sent and received.
    pub tokens: u64,
    /// US dollars.
    pub cost: f64,
    /// Bytes of all prompts.
    pub prompt_bytes: u64,
    /// Prompts in flight at once, from 1 to 100,000.
    pub concurrency: u32,
    /// Time since the budget was made, at most 30 days.
    pub wall: Duration,
}

impl Default for BudgetLimits {
    fn default() -> Self {
        Self {
            calls: 10_000,
            tokens: 50_000_000,
            cost: 20.0,
            prompt_bytes: 4 << 30,
            concurrency: 256,
            wall: Duration::from_secs(3600),
        }
    }
}

impl BudgetLimits {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the first field that is out of its range, and the range.
    pub fn validate(&self) -> Result<()> {
        if !(self.cost >= 0.0 && self.cost.is_finite()) {
            let reason = format!("must be a number of dollars, not {}", self.cost);
            return Err(Error::invalid("budget.cost", reason));
        }
        if !(1..=CONCURRENCY_MAX).contains(&self.concurrency) {
            let reason =
                format!("must be between 1 and {CONCURRENCY_MAX}, not {}", self.concurrency);
            return Err(Error::invalid("budget.concurrency", reason));
        }
        if self.wall > WALL_MAX {
            let reason = format!("must be at most {WALL_MAX:?}, not {:?}", self.wall);
            return Err(Error::invalid("budget.wall", reason));
        }
        Ok(())
    }
}

/// A part of a budget that can be used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetPart {
    /// [`BudgetLimits::calls`].
    Calls,
    /// [`BudgetLimits::tokens`].
    Tokens,
    /// [`BudgetLimits::cost`].
    Cost,
    /// [`BudgetLimits::prompt_bytes`].
    PromptBytes,
    /// [`BudgetLimits::wall`].
    Wall,
}

/// Which part of a budget is used up, and by how much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exhausted {
    /// Which part.
    pub part: BudgetPart,
    /// What the guest is told, without the leading `Error: `.
    pub message: String,
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Exhausted> for LmError {
    fn from(exhausted: Exhausted) -> Self {
        Self::new(exhausted.message)
    }
}

/// What was spent of a budget.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Spent {
    /// Prompts that were sent.
    pub calls: u64,
    /// Their bytes.
    pub prompt_bytes: u64,
    /// Prompts in flight now.
    pub in_flight: u32,
    /// Tokens and cost of the answers, by model.
    pub usage: UsageSummary,
    /// Time since the budget was made.
    pub elapsed: Duration,
}

/// A budget, shared by everything that was given a clone of it or a [`handler`](Self::handler).
///
/// What a call costs is known when it's answered. As long as what calls in flight are likely to cost
/// fits into what is left, they run at once; near the end of the budget they run one by one. So a
/// budget is overspent by at most about one call.
///
/// A prompt that was sent is spent, also when nobody waited for the answer. Dropping a call gives
/// everything else back.
///
/// ```
/// use std::sync::Arc;
/// use kaa::lm::{Budget, BudgetLimits, LmHandler, LmKind, LmRequest, Prompt, ScriptedHandler};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> kaa::Result<()> {
/// let budget = Budget::new(BudgetLimits { calls: 1, ..BudgetLimits::default() })?;
/// let handler = budget.handler(Arc::new(ScriptedHandler::echo()));
/// let prompt = Prompt::Text("hi".into());
/// let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
/// assert_eq!(handler.complete(&request).await.unwrap().response, "hi");
/// let error = handler.complete(&request).await.unwrap_err();
/// assert_eq!(error.message, "LM call limit exceeded: 1 + 1 > 1");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Budget(Arc<Inner>);

struct Inner {
    limits: BudgetLimits,
    start: Instant,
    books: Mutex<Books>,
    permits: Arc<Semaphore>,
    /// A call ended, or a part is used up.
    changed: Notify,
}

#[derive(Default)]
struct Books {
    calls: u64,
    prompt_bytes: u64,
    in_flight: u32,
    usage: UsageSummary,
    tokens: u64,
    cost: f64,
    /// Answers that `tokens` and `cost` are of.
    answers: u64,
    /// What calls in flight are likely to cost.
    expected: Expected,
    exhausted: Option<Exhausted>,
}

/// What calls are likely to cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Expected {
    tokens: u64,
    cost: f64,
}

impl Books {
    /// What a prompt of so many bytes is likely to cost: as much as those before on average, and no
    /// fewer tokens than it has itself.
    fn expect(&self, bytes: usize) -> Expected {
        let answers = self.answers.max(1);
        let tokens = (self.tokens / answers).max(estimated_tokens(bytes));
        Expected { tokens, cost: self.cost / answers as f64 }
    }

    fn fits(&self, limits: &BudgetLimits, more: Expected) -> bool {
        let tokens = self.tokens.saturating_add(self.expected.tokens).saturating_add(more.tokens);
        tokens <= limits.tokens && self.cost + self.expected.cost + more.cost <= limits.cost
    }
}

impl Budget {
    /// A budget of which nothing is spent. Its wall time begins now.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the field that is out of its range.
    pub fn new(limits: BudgetLimits) -> Result<Self> {
        limits.validate()?;
        let permits = Arc::new(Semaphore::new(limits.concurrency as usize));
        Ok(Self(Arc::new(Inner {
            limits,
            start: Instant::now(),
            books: Mutex::default(),
            permits,
            changed: Notify::new(),
        })))
    }

    /// What may be spent.
    #[must_use]
    pub fn limits(&self) -> &BudgetLimits {
        &self.0.limits
    }

    /// What was spent so far.
    #[must_use]
    pub fn spent(&self) -> Spent {
        let books = self.0.books();
        Spent {
            calls: books.calls,
            prompt_bytes: books.prompt_bytes,
            in_flight: books.in_flight,
            usage: books.usage.clone(),
            elapsed: self.0.start.elapsed(),
        }
    }

    /// A handler whose calls are paid from this budget.
    #[must_use]
    pub fn handler(&self, inner: Arc<dyn LmHandler>) -> Arc<dyn LmHandler> {
        Arc::new(Paid { budget: self.clone(), inner })
    }

    /// Which part is used up, if one is: no call can be made any more. Calls and prompt bytes count
    /// as used up when a call was refused for them.
    #[must_use]
    pub fn exhausted(&self) -> Option<Exhausted> {
        let over = self.0.overtime();
        over.or_else(|| self.0.books().exhausted.clone())
    }

    /// Waits until a part is used up.
    pub async fn until_exhausted(&self) -> Exhausted {
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            // Listens before it looks, so that no change falls between the two.
            changed.as_mut().enable();
            if let Some(exhausted) = self.exhausted() {
                return exhausted;
            }
            // The end of its time, or a change: either way it looks again.
            let _ = timeout_at(self.deadline(), changed).await;
        }
    }

    /// When its wall time is over.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.0.start + self.0.limits.wall
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget")
            .field("limits", &self.0.limits)
            .field("spent", &self.spent())
            .finish()
    }
}

impl Inner {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn overtime(&self) -> Option<Exhausted> {
        let elapsed = self.start.elapsed();
        (elapsed >= self.limits.wall).then(|| Exhausted {
            part: BudgetPart::Wall,
            message: format!(
                "Timeout exhausted ({:.1}s of {:.1}s)",
                elapsed.as_secs_f64(),
                self.limits.wall.as_secs_f64()
            ),
        })
    }

    /// A call may be sent, or has to wait for those in flight.
    fn admit(&self, count: u64, bytes: u64, expected: Expected) -> Result<bool, Exhausted> {
        if let Some(exhausted) = self.overtime() {
            return Err(exhausted);
        }
        let limits = &self.limits;
        let mut books = self.books();
        let refused = if books.calls.saturating_add(count) > limits.calls {
            let message =
                format!("LM call limit exceeded: {} + {count} > {}", books.calls, limits.calls);
            Some(Exhausted { part: BudgetPart::Calls, message })
        } else if books.prompt_bytes.saturating_add(bytes) > limits.prompt_bytes {
            let message = format!(
                "Prompt limit exceeded: {} + {bytes} of {} bytes",
                grouped(books.prompt_bytes),
                grouped(limits.prompt_bytes)
            );
            Some(Exhausted { part: BudgetPart::PromptBytes, message })
        } else {
            books.exhausted.clone()
        };
        if let Some(exhausted) = refused {
            // A batch is refused whole, but its calls may still fit one by one.
            if count == 1 {
                books.exhausted.get_or_insert_with(|| exhausted.clone());
                drop(books);
                self.changed.notify_waiters();
            }
            return Err(exhausted);
        }
        if books.in_flight > 0 && !books.fits(limits, expected) {
            return Ok(false);
        }
        books.calls += count;
        books.prompt_bytes += bytes;
        books.in_flight = books.in_flight.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        books.expected.tokens = books.expected.tokens.saturating_add(expected.tokens);
        books.expected.cost += expected.cost;
        Ok(true)
    }

    /// Waits for its turn to send a call.
    async fn admitted(self: &Arc<Self>, request: &LmRequest) -> Result<Ticket, Exhausted> {
        let bytes = request.prompt.bytes();
        let deadline = self.start + self.limits.wall;
        let permits = Arc::clone(&self.permits);
        let permit = match timeout_at(deadline, permits.acquire_owned()).await {
            Ok(permit) => permit.ok(),
            Err(_) => return Err(self.timed_out()),
        };
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let expected = self.books().expect(bytes);
            if self.admit(1, bytes as u64, expected)? {
                let inner = Arc::clone(self);
                return Ok(Ticket { inner, count: 1, expected, _permit: permit });
            }
            let _ = timeout_at(deadline, changed).await;
        }
    }

    /// Leave to send a batch as it is, when there is no doubt that it fits.
    fn admitted_batch(
        self: &Arc<Self>,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Option<(Ticket, usize)> {
        let most = concurrency.clamp(1, requests.len().max(1));
        let wanted = u32::try_from(most).ok()?;
        let permit = Arc::clone(&self.permits).try_acquire_many_owned(wanted).ok()?;
        let (mut bytes, mut expected) = (0, Expected::default());
        {
            let books = self.books();
            for request in requests {
                let size = request.prompt.bytes();
                bytes += size as u64;
                let one = books.expect(size);
                expected.tokens = expected.tokens.saturating_add(one.tokens);
                expected.cost += one.cost;
            }
            if !books.fits(&self.limits, expected) {
                return None;
            }
        }
        let count = u32::try_from(requests.len()).ok()?;
        let admitted = matches!(self.admit(count.into(), bytes, expected), Ok(true));
        let inner = Arc::clone(self);
        admitted.then(|| (Ticket { inner, count, expected, _permit: Some(permit) }, most))
    }

    fn timed_out(&self) -> Exhausted {
        // By a hair it may not be over yet by the clock that is looked at.
        self.overtime().unwrap_or_else(|| {
            let wall = self.limits.wall.as_secs_f64();
            let message = format!("Timeout exhausted ({wall:.1}s of {wall:.1}s)");
            Exhausted { part: BudgetPart::Wall, message }
        })
    }

    /// Counts what a call cost. An error mostly cost nothing.
    fn book(&self, result: &Result<LmCompletion, LmError>) {
        let spent = usage_of(result);
        if result.is_err() && spent.is_empty() {
            return;
        }
        let limits = &self.limits;
        let mut books = self.books();
        for usage in spent {
            let tokens = usage.input_tokens.saturating_add(usage.output_tokens);
            books.tokens = books.tokens.saturating_add(tokens);
            books.cost += usage.cost.unwrap_or(0.0);
        }
        books.answers += 1;
        books.usage.add(spent);
        if books.exhausted.is_some() {
            return;
        }
        if books.tokens >= limits.tokens {
            let (used, limit) = (grouped(books.tokens), grouped(limits.tokens));
            let message = format!("Token limit exceeded: {used} of {limit} tokens");
            books.exhausted = Some(Exhausted { part: BudgetPart::Tokens, message });
        } else if books.cost > 0.0 && books.cost >= limits.cost {
            let message =
                format!("Budget exhausted (spent ${:.6} of ${:.6})", books.cost, limits.cost);
            books.exhausted = Some(Exhausted { part: BudgetPart::Cost, message });
        }
    }
}

/// A number with commas, as RLM's messages have it.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Calls in flight, until it's dropped.
struct Ticket {
    inner: Arc<Inner>,
    count: u32,
    expected: Expected,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut books = self.inner.books();
        books.in_flight -= self.count;
        books.expected.tokens = books.expected.tokens.saturating_sub(self.expected.tokens);
        // Sums of floats don't come back to nothing by themselves.
        let cost =
            if books.in_flight == 0 { 0.0 } else { books.expected.cost - self.expected.cost };
        books.expected.cost = cost;
        drop(books);
        self.inner.changed.notify_waiters();
    }
}

/// A handler with a budget.
struct Paid {
    budget: Budget,
    inner: Arc<dyn LmHandler>,
}

#[async_trait]
impl LmHandler for Paid {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let ticket = self.budget.0.admitted(request).await?;
        let inner = &ticket.inner;
        let answer = timeout_at(self.budget.deadline(), self.inner.complete(request)).await;
        let result = answer.map_err(|_| inner.timed_out())?;
        inner.book(&result);
        result
    }

    fn model_name(&self, depth: i32) -> Option<&str> {
        self.inner.model_name(depth)
    }

    fn nests(&self, kind: LmKind) -> bool {
        self.inner.nests(kind)
    }

    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let Some((ticket, concurrency)) = self.budget.0.admitted_batch(requests, concurrency)
        else {
            return super::fan_out(self, requests, concurrency).await;
        };
        let inner = &ticket.inner;
        let batch = self.inner.complete_batch(requests, concurrency);
        let Ok(results) = timeout_at(self.budget.deadline(), batch).await else {
            let error = in_batch(inner.timed_out().into());
            return vec![Err(error); requests.len()];
        };
        results.iter().for_each(|result| inner.book(result));
        results
    }
}

#[cfg(test)]
mod tests;
