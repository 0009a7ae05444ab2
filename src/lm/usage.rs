//! What calls of language models cost, counted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value as Json, json};

use super::MODEL_NAME_BYTES_MAX;

/// Models that one summary tells apart: their names may come from a guest.
const MODELS_MAX: usize = 256;
/// Under which the rest is counted.
const OTHER_MODELS: &str = "(other models)";

/// Calls and tokens of one model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelUsage {
    /// The model's name.
    pub model: String,
    /// Calls.
    pub calls: u64,
    /// Tokens sent.
    pub input_tokens: u64,
    /// Tokens received.
    pub output_tokens: u64,
    /// Cost in US dollars, where the handler knows a price.
    pub cost: Option<f64>,
}

/// What calls cost, by model: RLM's `UsageSummary`.
///
/// It tells 256 models apart, since guests name them; more are counted as `(other models)`.
///
/// ```
/// use kaa::lm::{ModelUsage, UsageSummary};
///
/// let mut usage = UsageSummary::default();
/// let call = ModelUsage {
///     model: "small".into(), calls: 1, input_tokens: 20, output_tokens: 3, cost: Some(0.001),
/// };
/// usage.add(&[call.clone(), call]);
/// assert_eq!((usage.calls(), usage.input_tokens(), usage.cost()), (2, 40, Some(0.002)));
/// assert_eq!(
///     usage.to_json().to_string(),
///     r#"{"model_usage_summaries":{"small":{"total_calls":2,"total_cost":0.002,"#.to_owned()
///         + r#""total_input_tokens":40,"total_output_tokens":6}},"total_cost":0.002}"#
/// );
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UsageSummary {
    models: BTreeMap<String, ModelUsage>,
}

impl UsageSummary {
    /// Adds what calls cost.
    pub fn add(&mut self, usage: &[ModelUsage]) {
        for one in usage {
            let known = self.models.contains_key(&one.model);
            let fits = self.models.len() < MODELS_MAX && one.model.len() <= MODEL_NAME_BYTES_MAX;
            let name = if known || fits { one.model.as_str() } else { OTHER_MODELS };
            let sum = match self.models.get_mut(name) {
                Some(sum) => sum,
                None => self.models.entry(name.to_owned()).or_insert_with(|| ModelUsage {
                    model: name.to_owned(),
                    ..ModelUsage::default()
                }),
            };
            sum.calls = sum.calls.saturating_add(one.calls);
            sum.input_tokens = sum.input_tokens.saturating_add(one.input_tokens);
            sum.output_tokens = sum.output_tokens.saturating_add(one.output_tokens);
            // A handler's own figure, which may be a server's: money doesn't come back.
            if let Some(cost) = one.cost.filter(|cost| cost.is_finite() && *cost >= 0.0) {
                sum.cost = Some(sum.cost.unwrap_or(0.0) + cost);
            }
        }
    }

    /// Adds another summary.
    pub fn merge(&mut self, other: &Self) {
        for usage in other.models.values() {
            self.add(std::slice::from_ref(usage));
        }
    }

    /// One entry per model, by name.
    pub fn models(&self) -> impl Iterator<Item = &ModelUsage> {
        self.models.values()
    }

    /// The entries as a list, by name.
    #[must_use]
    pub fn into_models(self) -> Vec<ModelUsage> {
        self.models.into_values().collect()
    }

    /// Calls of all models.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.sum(|usage| usage.calls)
    }

    /// Tokens sent to all models.
    #[must_use]
    pub fn input_tokens(&self) -> u64 {
        self.sum(|usage| usage.input_tokens)
    }

    /// Tokens received from all models.
    #[must_use]
    pub fn output_tokens(&self) -> u64 {
        self.sum(|usage| usage.output_tokens)
    }

    /// Cost of all models in US dollars; `None` when no price is known of any.
    #[must_use]
    pub fn cost(&self) -> Option<f64> {
        self.models.values().filter_map(|usage| usage.cost).reduce(|a, b| a + b)
    }

    fn sum(&self, part: impl Fn(&ModelUsage) -> u64) -> u64 {
        self.models.values().map(part).fold(0, u64::saturating_add)
    }

    /// RLM's form: `model_usage_summaries` by model, and `total_cost` where it's known.
    #[must_use]
    pub fn to_json(&self) -> Json {
        let mut models = Map::new();
        for usage in self.models.values() {
            let mut entry = json!({
                "total_calls": usage.calls,
                "total_input_tokens": usage.input_tokens,
                "total_output_tokens": usage.output_tokens,
            });
            if let Some(cost) = usage.cost {
                entry["total_cost"] = json!(cost);
            }
            models.insert(usage.model.clone(), entry);
        }
        let mut summary = json!({ "model_usage_summaries": models });
        if let Some(cost) = self.cost() {
            summary["total_cost"] = json!(cost);
        }
        summary
    }
}

/// A summary that several parties add to, and that may be a part of another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger {
    own: Arc<Mutex<UsageSummary>>,
    whole: Option<Arc<Ledger>>,
}

impl Ledger {
    /// A ledger of its own, whose entries are this one's, too.
    pub(crate) fn part(&self) -> Self {
        Self { own: Arc::default(), whole: Some(Arc::new(self.clone())) }
    }

    fn lock(&self) -> MutexGuard<'_, UsageSummary> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, usage: &[ModelUsage]) {
        self.lock().add(usage);
        if let Some(whole) = &self.whole {
            whole.add(usage);
        }
    }

    pub(crate) fn total(&self) -> UsageSummary {
        self.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(model: &str, cost: Option<f64>) -> ModelUsage {
        ModelUsage { model: model.into(), calls: 1, input_tokens: 5, output_tokens: 2, cost }
    }

    #[test]
    fn sums_are_kept_per_model() {
        let mut usage = UsageSummary::default();
        assert_eq!(usage.to_json(), json!({ "model_usage_summaries": {} }));
        usage.add(&[call("b", None), call("a", Some(0.5)), call("b", None)]);
        assert_eq!(
            usage.to_json(),
            json!({
                "model_usage_summaries": {
                    "a": {
                        "total_calls": 1, "total_input_tokens": 5, "total_output_tokens": 2,
                        "total_cost": 0.5
                    },
                    "b": { "total_calls": 2, "total_input_tokens": 10, "total_output_tokens": 4 },
                },
                "total_cost": 0.5,
            })
        );
        let mut twice = usage.clone();
        twice.merge(&usage);
        assert_eq!((twice.calls(), twice.cost(), twice.output_tokens()), (6, Some(1.0), 12));
    }

    #[test]
    fn names_of_guests_do_not_pile_up() {
        let mut usage = UsageSummary::default();
        for number in 0..10_000 {
            usage.add(&[call(&format!("model {number}"), None)]);
        }
        assert_eq!(usage.models().count(), MODELS_MAX + 1);
        assert_eq!(usage.calls(), 10_000);
        let rest = usage.models().find(|usage| usage.model == OTHER_MODELS).unwrap();
        assert_eq!(rest.calls, 10_000 - MODELS_MAX as u64);
        let mut usage = UsageSummary::default();
        usage.add(&[call(&"m".repeat(MODEL_NAME_BYTES_MAX + 1), None)]);
        assert_eq!(usage.models().next().unwrap().model, OTHER_MODELS);
    }

    #[test]
    fn money_does_not_come_back() {
        let mut usage = UsageSummary::default();
        usage.add(&[call("m", Some(1.0)), call("m", Some(-1e9)), call("m", Some(f64::NAN))]);
        assert_eq!((usage.calls(), usage.cost()), (3, Some(1.0)));
    }
}
