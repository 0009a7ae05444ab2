//! Budgets: every part, and what is given back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;

use super::*;
use crate::lm::Prompt;

/// Answers after a while; counts how many at once, and what was dropped.
#[derive(Default)]
struct Model {
    latency: Duration,
    /// Tokens and dollars of an answer.
    price: (u64, f64),
    now: AtomicUsize,
    most: AtomicUsize,
    knows_prices: bool,
}

struct InFlight<'a>(&'a AtomicUsize);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl LmHandler for Model {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        let _in_flight = InFlight(&self.now);
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(self.latency).await;
        if request.prompt.to_text() == "fail" {
            return Err(LmError::new("failed"));
        }
        let (input_tokens, cost) = self.price;
        let refused = request.prompt.to_text() == "refuse";
        let usage = vec![ModelUsage {
            model: "m".into(),
            calls: 1,
            input_tokens,
            output_tokens: 0,
            cost: Some(cost),
        }];
        if refused {
            return Err(LmError::new("refused").with_usage(usage));
        }
        Ok(LmCompletion { response: "yes".into(), usage, ..LmCompletion::default() })
    }

    fn expected_cost(&self, _: &LmRequest) -> Option<f64> {
        self.knows_prices.then_some(self.price.1)
    }
}

fn ask(text: &str) -> LmRequest {
    LmRequest { kind: LmKind::Llm, prompt: Prompt::Text(text.into()), model: None, depth: 1 }
}

fn paid(limits: BudgetLimits, model: Model) -> (Budget, Arc<Model>, Arc<dyn LmHandler>) {
    let (budget, model) = (Budget::new(limits).unwrap(), Arc::new(model));
    let handler = budget.handler(Arc::clone(&model) as _);
    (budget, model, handler)
}

const LIMITS: BudgetLimits = BudgetLimits {
    calls: 100,
    tokens: 1_000_000,
    cost: 100.0,
    prompt_bytes: 1_000,
    concurrency: 10,
    wall: Duration::from_secs(60),
};

#[tokio::test(start_paused = true)]
async fn every_part_ends_calls_with_its_own_words() {
    let price = (1_500, 0.25);
    let cases = [
        (
            BudgetLimits { calls: 2, ..LIMITS },
            BudgetPart::Calls,
            "LM call limit exceeded: 2 + 1 > 2",
        ),
        (
            BudgetLimits { tokens: 3_000, ..LIMITS },
            BudgetPart::Tokens,
            "Token limit exceeded: 3,000 of 3,000 tokens",
        ),
        (
            BudgetLimits { cost: 0.5, ..LIMITS },
            BudgetPart::Cost,
            "Budget exhausted (spent $0.500000 of $0.500000)",
        ),
        (
            BudgetLimits { wall: Duration::from_secs(2), ..LIMITS },
            BudgetPart::Wall,
            "Timeout exhausted (2.0s of 2.0s)",
        ),
    ];
    for (limits, part, message) in cases {
        let latency = Duration::from_secs(1);
        let (budget, _, handler) = paid(limits, Model { price, latency, ..Model::default() });
        for _ in 0..2 {
            handler.complete(&ask("four")).await.unwrap_or_else(|e| panic!("{part:?}: {e}"));
        }
        assert_eq!(handler.complete(&ask("four")).await.unwrap_err().message, message);
        let exhausted = budget.until_exhausted().await;
        assert_eq!((exhausted.part, exhausted.to_string()), (part, message.to_owned()));
        let spent = budget.spent();
        assert_eq!((spent.calls, spent.in_flight, spent.prompt_bytes), (2, 0, 8), "{part:?}");
        assert_eq!((spent.usage.input_tokens(), spent.usage.cost()), (3_000, Some(0.5)));
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_time_ends_calls_in_flight() {
    let limits = BudgetLimits { wall: Duration::from_secs(5), ..LIMITS };
    let (budget, model, handler) =
        paid(limits, Model { latency: Duration::from_secs(3600), ..Model::default() });
    let requests = [ask("a"), ask("b")];
    let (waiting, one, batch) = tokio::join!(
        budget.until_exhausted(),
        handler.complete(&requests[0]),
        handler.complete_batch(&requests, 4)
    );
    let timeout = "Timeout exhausted (5.0s of 5.0s)";
    assert_eq!((waiting.part, waiting.to_string()), (BudgetPart::Wall, timeout.to_owned()));
    assert_eq!(one.unwrap_err().message, timeout);
    for slot in batch {
        assert_eq!(slot.unwrap_err().message, format!("llm() call failed - {timeout}"));
    }
    assert_eq!((budget.spent().in_flight, model.now.load(Ordering::SeqCst)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn no_more_are_in_flight_than_the_budget_has_room_for() {
    let model = Model { latency: Duration::from_secs(1), ..Model::default() };
    let (budget, model, handler) = paid(BudgetLimits { concurrency: 3, ..LIMITS }, model);
    let requests: Vec<_> = (0..12).map(|number| ask(&format!("{number}"))).collect();
    let (single, batch) = tokio::join!(
        join_all(requests.iter().map(|request| handler.complete(request))),
        handler.complete_batch(&requests, 8)
    );
    assert!(single.iter().chain(&batch).all(Result::is_ok));
    assert_eq!(model.most.load(Ordering::SeqCst), 3);
    assert_eq!(budget.spent().calls, 24);
}

#[tokio::test(start_paused = true)]
async fn near_its_end_a_budget_is_spent_call_by_call() {
    // Ten dollars, a call costs one: the eleventh must not be sent, however many wait.
    let limits = BudgetLimits { cost: 10.0, concurrency: 100, ..LIMITS };
    let latency = Duration::from_secs(1);
    let (budget, _, handler) = paid(limits, Model { latency, price: (1, 1.0), ..Model::default() });
    // What a call costs is not known before there was one.
    handler.complete(&ask("first")).await.unwrap();
    let requests: Vec<_> = (0..50).map(|number| ask(&format!("{number}"))).collect();
    let (single, batch) = tokio::join!(
        join_all(requests.iter().map(|request| handler.complete(request))),
        handler.complete_batch(&requests, 50)
    );
    assert_eq!(single.iter().chain(&batch).filter(|answer| answer.is_ok()).count(), 9);
    assert_eq!(budget.spent().usage.cost(), Some(10.0));
    assert_eq!(budget.exhausted().unwrap().part, BudgetPart::Cost);
}

#[tokio::test(start_paused = true)]
async fn a_failure_in_a_batch_fills_its_own_slot() {
    let (budget, _, handler) = paid(LIMITS, Model::default());
    let requests = [ask("a"), ask("fail"), ask("c")];
    let answers = handler.complete_batch(&requests, 8).await;
    assert!(answers[0].is_ok() && answers[2].is_ok());
    assert_eq!(answers[1].as_ref().unwrap_err().message, "llm() call failed - failed");
    assert!(handler.complete_batch(&[], 8).await.is_empty());
    assert_eq!(budget.spent().calls, 3);
}

#[tokio::test(start_paused = true)]
async fn a_prompt_that_is_too_long_is_refused_alone() {
    let (budget, _, handler) = paid(BudgetLimits { prompt_bytes: 8, ..LIMITS }, Model::default());
    handler.complete(&ask("four")).await.unwrap();
    let error = handler.complete(&ask("longer")).await.unwrap_err().message;
    assert_eq!(error, "Prompt limit exceeded: 4 + 6 of 8 bytes");
    handler.complete(&ask("four")).await.unwrap();
    assert_eq!((budget.spent().prompt_bytes, budget.exhausted()), (8, None));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_knows_its_prices_is_not_overspent_from_the_first_call_on() {
    let limits = BudgetLimits { cost: 5.0, concurrency: 100, ..LIMITS };
    let latency = Duration::from_secs(1);
    let model = Model { latency, price: (1, 0.5), knows_prices: true, ..Model::default() };
    let (budget, model, handler) = paid(limits, model);
    // A cheap model before it says nothing about this one.
    handler.complete(&LmRequest { depth: 0, ..ask("root") }).await.unwrap();
    let requests: Vec<_> = (0..200).map(|number| ask(&format!("{number}"))).collect();
    let answers = handler.complete_batch(&requests, 200).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 9);
    assert_eq!(budget.spent().usage.cost(), Some(5.0));
    assert!(model.most.load(Ordering::SeqCst) > 4, "they run at once as long as they fit");
}

#[tokio::test(start_paused = true)]
async fn what_was_answered_before_a_batch_was_dropped_is_paid_for() {
    let latency = Duration::from_secs(1);
    let model = Model { latency, price: (1, 0.5), ..Model::default() };
    let (budget, _, handler) = paid(BudgetLimits { concurrency: 2, ..LIMITS }, model);
    let requests: Vec<_> = (0..8).map(|number| ask(&format!("{number}"))).collect();
    let batch = handler.complete_batch(&requests, 8);
    assert!(tokio::time::timeout(Duration::from_millis(2_500), batch).await.is_err());
    assert_eq!(budget.spent().usage.cost(), Some(2.0));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_refused_is_paid_for() {
    let limits = BudgetLimits { cost: 1.0, ..LIMITS };
    let (budget, _, handler) = paid(limits, Model { price: (1, 0.5), ..Model::default() });
    assert_eq!(handler.complete(&ask("refuse")).await.unwrap_err().message, "refused");
    handler.complete_batch(&[ask("refuse")], 1).await;
    assert_eq!(budget.spent().usage.cost(), Some(1.0));
    assert_eq!(budget.exhausted().unwrap().part, BudgetPart::Cost);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_does_not_fit_is_answered_as_far_as_it_does() {
    let (budget, _, handler) = paid(BudgetLimits { calls: 2, ..LIMITS }, Model::default());
    let answers = handler.complete_batch(&[ask("a"), ask("b"), ask("c")], 1).await;
    assert!(answers[0].is_ok() && answers[1].is_ok());
    let error = answers[2].as_ref().unwrap_err().message.as_str();
    assert_eq!(error, "llm() call failed - LM call limit exceeded: 2 + 1 > 2");
    assert_eq!(budget.spent().calls, 2);
}

#[tokio::test(start_paused = true)]
async fn dropped_calls_give_back_what_they_hold() {
    let model = Model { latency: Duration::from_secs(3600), ..Model::default() };
    let (budget, model, handler) = paid(BudgetLimits { concurrency: 40, ..LIMITS }, model);
    let requests: Vec<_> = (0..50).map(|number| ask(&format!("{number}"))).collect();
    let calls = async {
        tokio::join!(
            join_all(requests.iter().map(|request| handler.complete(request))),
            handler.complete_batch(&requests, 50)
        )
    };
    assert!(tokio::time::timeout(Duration::from_secs(1), calls).await.is_err());
    let spent = budget.spent();
    assert_eq!((spent.in_flight, model.now.load(Ordering::SeqCst)), (0, 0));
    // Those that waited for their turn were not sent, and are not spent.
    assert_eq!(spent.calls, 40);
    assert_eq!(budget.0.permits.available_permits(), 40);
    assert_eq!(budget.0.books().expected, Expected::default());
}

#[tokio::test(start_paused = true)]
async fn a_slow_call_holds_nobody_up() {
    // The first of a batch takes as long as all others together, two at once.
    let start = Instant::now();
    let call = async |number: u64| {
        tokio::time::sleep(Duration::from_secs(if number == 0 { 10 } else { 1 })).await;
        number
    };
    let results = crate::lm::at_once((0..11).map(call).collect(), 2).await;
    assert_eq!(results, (0..11).collect::<Vec<_>>());
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[test]
fn wrong_limits_are_refused_by_name() {
    let cases = [
        (BudgetLimits { cost: f64::NAN, ..LIMITS }, "budget.cost"),
        (BudgetLimits { cost: -1.0, ..LIMITS }, "budget.cost"),
        (BudgetLimits { concurrency: 0, ..LIMITS }, "budget.concurrency"),
        (BudgetLimits { wall: Duration::MAX, ..LIMITS }, "budget.wall"),
    ];
    for (limits, name) in cases {
        let error = Budget::new(limits).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
    assert!(BudgetLimits::default().validate().is_ok());
}

#[test]
fn numbers_have_commas() {
    for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345_678, "12,345,678")] {
        assert_eq!(grouped(number), text);
    }
}
