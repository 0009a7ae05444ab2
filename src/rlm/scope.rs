//! What a root run and all its children share: the budget, the watchers, and the word to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::{OnceCell, watch};

use super::{Inner, RlmEvent, RlmProgress, RlmStop};
use crate::environment::{Backend, Context};
use crate::error::Result;
use crate::lm::{Budget, BudgetPart, LmHandler};
use crate::tenant::LmQuota;

/// One run from the root down.
pub(super) struct Scope {
    rlm: Arc<Inner>,
    pub(super) budget: Budget,
    /// The model, paid from the budget.
    pub(super) lm: Arc<dyn LmHandler>,
    /// What the tenant may ask of it: calls of loops are made outside of any session.
    pub(super) quota: Option<LmQuota>,
    /// Counts calls of `Rlm::cancel`; this run began at `cancels_before`.
    cancels: watch::Receiver<u64>,
    cancels_before: u64,
    turn: AtomicU32,
    cells: AtomicU32,
    children: AtomicU32,
    /// The root's context, for children that share it.
    context: Option<Context>,
    shared: OnceCell<Option<Arc<dyn Backend>>>,
}

/// The number of a shared context in a child, whose own is 0.
const SHARED_INDEX: u32 = 1;

impl Scope {
    pub(super) fn new(rlm: &Arc<Inner>, context: Option<Context>) -> Result<Self> {
        let budget = Budget::new(rlm.options.budget.clone())?;
        let lm = budget.handler(Arc::clone(&rlm.lm));
        let tenant =
            rlm.options.environment.tenant.clone().or_else(|| rlm.backend.default_tenant());
        let mut cancels = rlm.cancels.subscribe();
        let cancels_before = *cancels.borrow_and_update();
        Ok(Self {
            rlm: Arc::clone(rlm),
            budget,
            lm,
            quota: tenant.map(|tenant| tenant.lm()),
            cancels,
            cancels_before,
            turn: AtomicU32::new(0),
            cells: AtomicU32::new(0),
            children: AtomicU32::new(0),
            context,
            shared: OnceCell::new(),
        })
    }

    /// Why the run has to end, if it has to.
    pub(super) fn stop(&self) -> Option<RlmStop> {
        if *self.cancels.borrow() != self.cancels_before {
            return Some(RlmStop::Cancelled);
        }
        let exhausted = self.budget.exhausted()?;
        let (limits, spent) = (self.budget.limits(), self.budget.spent());
        Some(match exhausted.part {
            BudgetPart::Wall => RlmStop::Timeout { elapsed: spent.elapsed, limit: limits.wall },
            BudgetPart::Cost => {
                RlmStop::Budget { spent: spent.usage.cost().unwrap_or(0.0), limit: limits.cost }
            }
            BudgetPart::Calls | BudgetPart::Tokens | BudgetPart::PromptBytes => {
                RlmStop::Limit(exhausted)
            }
        })
    }

    /// Waits until a running cell has to end: what it could still do would be of no use.
    ///
    /// Not when only calls are used up: it may yet make something of what it has.
    pub(super) async fn until_interrupted(&self) {
        let mut cancels = self.cancels.clone();
        let cancelled = cancels.wait_for(|count| *count != self.cancels_before);
        let exhausted = async {
            let part = self.budget.until_exhausted().await.part;
            if matches!(part, BudgetPart::Calls | BudgetPart::PromptBytes) {
                tokio::time::sleep_until(self.budget.deadline()).await;
            }
        };
        tokio::select! {
            _ = cancelled => {}
            () = exhausted => {}
        }
    }

    /// Does something that isn't worth more than the run: it's dropped when the run has to end.
    pub(super) async fn unless_interrupted<T>(
        &self,
        step: impl Future<Output = Result<T, RlmStop>>,
    ) -> Result<T, RlmStop> {
        tokio::select! {
            biased;
            result = step => result,
            () = self.until_interrupted() => Err(self.stop().unwrap_or(RlmStop::Cancelled)),
        }
    }

    pub(super) fn begin_turn(&self, depth: u16, turn: u32) {
        if depth == 0 {
            self.turn.store(turn, Ordering::Relaxed);
        }
        let turns_max = self.rlm.options.max_iterations;
        self.report(RlmEvent::TurnBegan { depth, turn, turns_max });
    }

    pub(super) fn begin_cell(&self, depth: u16, code: &str) {
        self.cells.fetch_add(1, Ordering::Relaxed);
        self.report(RlmEvent::CellBegan { depth, code });
    }

    /// Counts a child; `false`: there were enough.
    pub(super) fn may_begin_child(&self) -> bool {
        let most = self.rlm.options.max_children;
        let more = |count: u32| (count < most).then_some(count + 1);
        self.children.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// How many contexts a child's session has, its own included.
    pub(super) fn shared_contexts(&self) -> u32 {
        self.context.as_ref().map_or(0, |_| SHARED_INDEX + 1)
    }

    /// Where children have their sessions from, and the contexts that each of them still needs.
    pub(super) async fn child_backend(&self) -> Result<(Arc<dyn Backend>, Vec<(u32, Context)>)> {
        let own = Arc::clone(&self.rlm.backend);
        let Some(context) = &self.context else { return Ok((own, Vec::new())) };
        let contexts = vec![(SHARED_INDEX, context.clone())];
        let options = &self.rlm.options.environment;
        let shared = self.shared.get_or_try_init(|| own.with_contexts(&contexts, options)).await?;
        Ok(match shared {
            Some(template) => (Arc::clone(template), Vec::new()),
            None => (own, contexts),
        })
    }

    pub(super) fn report(&self, event: RlmEvent<'_>) {
        let Some(observer) = &self.rlm.options.observer else { return };
        let spent = self.budget.spent();
        let progress = RlmProgress {
            turn: self.turn.load(Ordering::Relaxed),
            turns_max: self.rlm.options.max_iterations,
            cells: self.cells.load(Ordering::Relaxed),
            children: self.children.load(Ordering::Relaxed),
            calls: spent.calls,
            calls_in_flight: spent.in_flight,
            input_tokens: spent.usage.input_tokens(),
            output_tokens: spent.usage.output_tokens(),
            cost: spent.usage.cost(),
        };
        observer.event(event, &progress);
    }
}
