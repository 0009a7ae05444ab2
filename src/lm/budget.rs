//! Budgets: what several sessions may spend on language models together.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::{
    LmCompletion, LmError, LmHandler, LmKind, LmRequest, ModelUsage, UsageSummary,
    estimated_tokens, usage_of,
};
use crate::error::{Error, Result};

const CONCURRENCY_MAX: u32 = 100_000;
/// Kinds of calls whose cost is learnt.
const LINES_MAX: usize = 256;
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
/// What a call costs is known when it's answered. Until then it counts with what it's likely to cost:
/// what its handler expects from its prices, or what calls of that model have cost so far on average.
/// Calls run at once as long as that fits into what is left, and one by one near the end of the
/// budget. So it's overspent by what calls in flight cost more than expected. Of a model whose price
/// nobody knows before its first answer, all that are in flight then are unexpected.
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
    /// What answers cost, by whom they were asked of.
    seen: HashMap<Line, Seen>,
    /// What calls in flight are likely to cost.
    expected: Expected,
    exhausted: Option<Exhausted>,
}

/// Calls that are likely to cost alike: of one model by name, or of one level of a loop.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Line {
    model: Option<String>,
    depth: i32,
}

impl Line {
    fn of(request: &LmRequest) -> Self {
        Self { model: request.model.clone(), depth: request.depth }
    }
}

/// Answers, and what they cost together.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    answers: u64,
    cost: Expected,
}

/// What calls are likely to cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Expected {
    tokens: u64,
    cost: f64,
}

impl Books {
    fn tokens(&self) -> u64 {
        self.usage.input_tokens().saturating_add(self.usage.output_tokens())
    }

    fn cost(&self) -> f64 {
        self.usage.cost().unwrap_or(0.0)
    }

    /// What a prompt of so many bytes is likely to cost: as much as those before on average, and no
    /// fewer tokens than it has itself.
    fn expect(&self, line: &Line, bytes: usize) -> Expected {
        let seen = self.seen.get(line).copied().unwrap_or_default();
        let answers = seen.answers.max(1);
        let own = estimated_tokens(bytes);
        let tokens = (seen.cost.tokens / answers).max(own);
        Expected { tokens, cost: seen.cost.cost / answers as f64 }
    }

    fn learn(&mut self, line: Line, spent: &[ModelUsage]) {
        // Guests name models.
        if self.seen.len() >= LINES_MAX && !self.seen.contains_key(&line) {
            return;
        }
        let mut sum = UsageSummary::default();
        sum.add(spent);
        let seen = self.seen.entry(line).or_default();
        seen.answers += 1;
        let tokens = sum.input_tokens().saturating_add(sum.output_tokens());
        seen.cost.tokens = seen.cost.tokens.saturating_add(tokens);
        seen.cost.cost += sum.cost().unwrap_or(0.0);
    }

    fn fits(&self, limits: &BudgetLimits, more: Expected) -> bool {
        let tokens = self.tokens().saturating_add(self.expected.tokens).saturating_add(more.tokens);
        tokens <= limits.tokens && self.cost() + self.expected.cost + more.cost <= limits.cost
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

    /// Which part is used up, if one is: no call can be made any more. Calls count as used up when one
    /// was refused.
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
    fn admit(&self, bytes: u64, expected: Expected) -> Result<bool, Exhausted> {
        if let Some(exhausted) = self.overtime() {
            return Err(exhausted);
        }
        let limits = &self.limits;
        let mut books = self.books();
        if let Some(exhausted) = &books.exhausted {
            return Err(exhausted.clone());
        }
        if books.prompt_bytes.saturating_add(bytes) > limits.prompt_bytes {
            // Another prompt may be shorter.
            let (sent, most) = (grouped(books.prompt_bytes), grouped(limits.prompt_bytes));
            let message =
                format!("Prompt limit exceeded: {sent} + {} of {most} bytes", grouped(bytes));
            return Err(Exhausted { part: BudgetPart::PromptBytes, message });
        }
        if books.calls >= limits.calls {
            let message = format!("LM call limit exceeded: {} + 1 > {}", books.calls, limits.calls);
            let exhausted = Exhausted { part: BudgetPart::Calls, message };
            books.exhausted = Some(exhausted.clone());
            drop(books);
            self.changed.notify_waiters();
            return Err(exhausted);
        }
        if books.in_flight > 0 && !books.fits(limits, expected) {
            return Ok(false);
        }
        books.calls += 1;
        books.prompt_bytes += bytes;
        books.in_flight += 1;
        books.expected.tokens = books.expected.tokens.saturating_add(expected.tokens);
        books.expected.cost += expected.cost;
        Ok(true)
    }

    /// Waits for its turn to send a call, which its handler expects to cost so much.
    async fn admitted(
        self: &Arc<Self>,
        request: &LmRequest,
        cost: Option<f64>,
    ) -> Result<Ticket, Exhausted> {
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
            let mut expected = self.books().expect(&Line::of(request), bytes);
            expected.cost = expected.cost.max(cost.unwrap_or(0.0));
            if self.admit(bytes as u64, expected)? {
                let inner = Arc::clone(self);
                return Ok(Ticket { inner, expected, _permit: permit });
            }
            let _ = timeout_at(deadline, changed).await;
        }
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
    fn book(&self, request: &LmRequest, result: &Result<LmCompletion, LmError>) {
        let spent = usage_of(result);
        if result.is_err() && spent.is_empty() {
            return;
        }
        let limits = &self.limits;
        let mut books = self.books();
        books.usage.add(spent);
        books.learn(Line::of(request), spent);
        if books.exhausted.is_some() {
            return;
        }
        let (tokens, cost) = (books.tokens(), books.cost());
        if tokens >= limits.tokens {
            let (used, limit) = (grouped(tokens), grouped(limits.tokens));
            let message = format!("Token limit exceeded: {used} of {limit} tokens");
            books.exhausted = Some(Exhausted { part: BudgetPart::Tokens, message });
        } else if cost > 0.0 && cost >= limits.cost {
            let message = format!("Budget exhausted (spent ${cost:.6} of ${:.6})", limits.cost);
            books.exhausted = Some(Exhausted { part: BudgetPart::Cost, message });
        }
    }
}

/// A number with commas, as RLM's messages have it.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Calls in flight, until it's dropped.
struct Ticket {
    inner: Arc<Inner>,
    expected: Expected,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut books = self.inner.books();
        books.in_flight -= 1;
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
        let cost = self.inner.expected_cost(request);
        let ticket = self.budget.0.admitted(request, cost).await?;
        let inner = &ticket.inner;
        let answer = timeout_at(self.budget.deadline(), self.inner.complete(request)).await;
        let result = answer.map_err(|_| inner.timed_out())?;
        inner.book(request, &result);
        result
    }

    fn expected_cost(&self, request: &LmRequest) -> Option<f64> {
        self.inner.expected_cost(request)
    }

    fn model_name(&self, depth: i32) -> Option<&str> {
        self.inner.model_name(depth)
    }

    fn nests(&self, kind: LmKind) -> bool {
        self.inner.nests(kind)
    }
}

#[cfg(test)]
mod tests;
