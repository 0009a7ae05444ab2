//! Several models behind one handler.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use super::{Ledger, LmCompletion, LmError, LmHandler, LmKind, LmRequest, UsageSummary, usage_of};
use crate::error::{Error, Result};

/// Gives each call to the model that it is for, as RLM's handler does:
///
/// 1. to the model that the call names, if there is one of that name;
/// 2. otherwise to the default for the call's depth, if there is one;
/// 3. otherwise to the default.
///
/// So a name that nobody knows is no error; it's repeated in the [completion](LmCompletion::model).
/// Calls of an RLM's own loop have depth 0, those of its cells depth 1, of its children's cells 2.
///
/// # Example
///
/// ```
/// use std::sync::Arc;
/// use kaa::lm::{LmHandler, LmKind, LmRequest, ModelRouter, Prompt, ScriptedHandler};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let always = |answer: &'static str| Arc::new(ScriptedHandler::from_fn(|_| Ok(answer.into())));
/// let router = ModelRouter::builder()
///     .model("big", always("from big"))
///     .model("small", always("from small"))
///     .default_from_depth(1, "small")
///     .build()?;
/// for (model, depth, answer) in [
///     (None, 0, "from big"),
///     (None, 1, "from small"),
///     (Some("big"), 1, "from big"),
///     (Some("unheard of"), 1, "from small"),
/// ] {
///     let (prompt, model) = (Prompt::Text("hi".into()), model.map(str::to_owned));
///     let request = LmRequest { kind: LmKind::Llm, prompt, model, depth };
///     assert_eq!(router.complete(&request).await?.response, answer);
/// }
/// assert_eq!(router.usage().calls(), 4);
/// # Ok(())
/// # }
/// ```
pub struct ModelRouter {
    models: HashMap<String, Arc<dyn LmHandler>>,
    default: String,
    by_depth: BTreeMap<i32, String>,
    usage: Ledger,
}

impl ModelRouter {
    /// Begins a router without models.
    ///
    /// ```
    /// use kaa::lm::ModelRouter;
    ///
    /// let error = ModelRouter::builder().build().unwrap_err();
    /// assert_eq!(error.to_string(), "models: there is none; add one");
    /// ```
    #[must_use]
    pub fn builder() -> ModelRouterBuilder {
        ModelRouterBuilder::default()
    }

    /// The model that answers calls of this depth which name none.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use kaa::lm::{ModelRouter, ScriptedHandler};
    ///
    /// # fn main() -> kaa::Result<()> {
    /// let router =
    ///     ModelRouter::builder().model("only", Arc::new(ScriptedHandler::echo())).build()?;
    /// assert_eq!(router.default_model(1), "only");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn default_model(&self, depth: i32) -> &str {
        self.by_depth.range(..=depth).next_back().map_or(&self.default, |(_, name)| name)
    }

    /// The same router with the defaults of RLM's handler, for a server of its protocol: the one for
    /// depth 1 is for that depth alone, and any other gets the default.
    ///
    /// Without it, deeper calls are answered as those of depth 1, as a loop with children wants it.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use kaa::lm::{ModelRouter, ScriptedHandler};
    ///
    /// # fn main() -> kaa::Result<()> {
    /// let router = ModelRouter::builder()
    ///     .model("big", Arc::new(ScriptedHandler::echo()))
    ///     .model("small", Arc::new(ScriptedHandler::echo()))
    ///     .default_from_depth(1, "small")
    ///     .build()?
    ///     .with_depths_of_rlm();
    /// assert_eq!([0, 1, 2].map(|depth| router.default_model(depth)), ["big", "small", "big"]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_depths_of_rlm(mut self) -> Self {
        let second = self.default_model(1).to_owned();
        self.by_depth = [(1, second), (2, self.default.clone())].into();
        self
    }

    /// What all calls that went through have cost, by model. Those of a batch that goes to a server as a
    /// whole are counted when all of it is answered.
    #[must_use]
    pub fn usage(&self) -> UsageSummary {
        self.usage.total()
    }

    /// The name of the model that a call is for.
    fn target(&self, request: &LmRequest) -> &str {
        let named = request.model.as_ref().and_then(|name| self.models.get_key_value(name));
        named.map_or_else(|| self.default_model(request.depth), |(name, _)| name)
    }

    fn booked(
        &self,
        request: &LmRequest,
        result: Result<LmCompletion, LmError>,
    ) -> Result<LmCompletion, LmError> {
        self.usage.add(usage_of(&result));
        let mut completion = result?;
        if let Some(name) = &request.model {
            completion.model.clone_from(name);
        }
        Ok(completion)
    }
}

impl fmt::Debug for ModelRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<_> = self.models.keys().collect();
        names.sort();
        f.debug_struct("ModelRouter")
            .field("models", &names)
            .field("default", &self.default)
            .field("by_depth", &self.by_depth)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl LmHandler for ModelRouter {
    fn model_name(&self, depth: i32) -> Option<&str> {
        let name = self.default_model(depth);
        self.models[name].model_name(depth).or(Some(name))
    }

    fn expected_cost(&self, request: &LmRequest) -> Option<f64> {
        self.models[self.target(request)].expected_cost(request)
    }

    fn batches(&self, kind: LmKind) -> bool {
        self.models.values().any(|model| model.batches(kind))
    }

    fn nests(&self, kind: LmKind) -> bool {
        self.models.values().any(|model| model.nests(kind))
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        self.booked(request, self.models[self.target(request)].complete(request).await)
    }

    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let targets: Vec<&str> = requests.iter().map(|request| self.target(request)).collect();
        let Some(first) = targets.first() else { return Vec::new() };
        // A guest's batch has one model and one depth, and may be one message to a server.
        let results = if targets.iter().all(|target| target == first) {
            self.models[*first].complete_batch(requests, concurrency).await
        } else {
            self.complete_mixed(requests, &targets, concurrency).await
        };
        let pairs = requests.iter().zip(results);
        pairs.map(|(request, result)| self.booked(request, result)).collect()
    }
}

impl ModelRouter {
    /// A batch for several models: one batch for each, one after the other, so that together they
    /// keep to `concurrency`.
    async fn complete_mixed(
        &self,
        requests: &[LmRequest],
        targets: &[&str],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let mut by_target: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, target) in targets.iter().enumerate() {
            by_target.entry(target).or_default().push(i);
        }
        let missing = Err(LmError::new("the model's handler sent too few answers"));
        let mut results = vec![missing; requests.len()];
        for (target, places) in by_target {
            let part: Vec<_> = places.iter().map(|i| requests[*i].clone()).collect();
            let answers = self.models[target].complete_batch(&part, concurrency).await;
            for (i, answer) in places.into_iter().zip(answers) {
                results[i] = answer;
            }
        }
        results
    }
}

/// Makes a [`ModelRouter`].
#[derive(Default)]
pub struct ModelRouterBuilder {
    models: Vec<(String, Arc<dyn LmHandler>)>,
    default: Option<String>,
    by_depth: Vec<(i32, String)>,
}

impl ModelRouterBuilder {
    /// Adds a model under the name by which calls ask for it.
    #[must_use]
    pub fn model(mut self, name: impl Into<String>, handler: Arc<dyn LmHandler>) -> Self {
        self.models.push((name.into(), handler));
        self
    }

    /// The model for calls that name none that is known; if this isn't said, the one added first.
    #[must_use]
    pub fn default_model(mut self, name: impl Into<String>) -> Self {
        self.default = Some(name.into());
        self
    }

    /// The model for such calls of this depth and deeper, until another one follows.
    #[must_use]
    pub fn default_from_depth(mut self, depth: i32, name: impl Into<String>) -> Self {
        self.by_depth.push((depth, name.into()));
        self
    }

    /// The router.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no model, a name is empty or there twice, or a default isn't
    /// among the models.
    pub fn build(self) -> Result<ModelRouter> {
        let Some((first, _)) = self.models.first() else {
            return Err(Error::invalid("models", "there is none; add one"));
        };
        let default = self.default.unwrap_or_else(|| first.clone());
        let mut models = HashMap::new();
        for (name, handler) in self.models {
            if name.trim().is_empty() {
                return Err(Error::invalid("models", "a model has an empty name"));
            }
            if models.insert(name.clone(), handler).is_some() {
                let reason = "two models have this name; give each its own";
                return Err(Error::invalid(format!("model {name:?}"), reason));
            }
        }
        let mut by_depth = BTreeMap::new();
        for (depth, name) in self.by_depth {
            if by_depth.insert(depth, name).is_some() {
                let reason = format!("there are two for depth {depth}; leave out one");
                return Err(Error::invalid("default model", reason));
            }
        }
        if let Some(name) = by_depth.values().chain([&default]).find(|&n| !models.contains_key(n)) {
            let mut known: Vec<_> = models.keys().map(String::as_str).collect();
            known.sort_unstable();
            let reason = format!("there is no model of this name, only {}", known.join(", "));
            return Err(Error::invalid(format!("default model {name:?}"), reason));
        }
        Ok(ModelRouter { models, default, by_depth, usage: Ledger::default() })
    }
}

impl fmt::Debug for ModelRouterBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.models.iter().map(|(name, _)| name).collect();
        f.debug_struct("ModelRouterBuilder")
            .field("models", &names)
            .field("default", &self.default)
            .field("by_depth", &self.by_depth)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::lm::{ModelUsage, Prompt, ScriptedHandler};

    /// Answers with its name, and notes the sizes of the batches that it gets.
    #[derive(Default)]
    struct Named {
        name: &'static str,
        batches: Mutex<Vec<usize>>,
    }

    impl Named {
        fn new(name: &'static str) -> Arc<Self> {
            Arc::new(Self { name, ..Self::default() })
        }
    }

    #[async_trait]
    impl LmHandler for Named {
        async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
            let prompt = request.prompt.to_text();
            if prompt == "fail" {
                return Err(LmError::new("failed"));
            }
            let usage = ModelUsage { model: self.name.into(), calls: 1, ..Default::default() };
            Ok(LmCompletion {
                model: self.name.into(),
                response: format!("{}: {prompt}", self.name),
                usage: vec![usage],
                ..LmCompletion::default()
            })
        }

        async fn complete_batch(
            &self,
            requests: &[LmRequest],
            _concurrency: usize,
        ) -> Vec<Result<LmCompletion, LmError>> {
            self.batches.lock().unwrap().push(requests.len());
            let mut results = Vec::new();
            for request in requests {
                results.push(self.complete(request).await);
            }
            results
        }
    }

    fn request(text: &str, model: Option<&str>, depth: i32) -> LmRequest {
        let (prompt, model) = (Prompt::Text(text.into()), model.map(str::to_owned));
        LmRequest { kind: LmKind::Llm, prompt, model, depth }
    }

    fn three() -> ModelRouterBuilder {
        let builder = ModelRouter::builder();
        ["a", "b", "c"]
            .into_iter()
            .fold(builder, |builder, name| builder.model(name, Named::new(name)))
    }

    #[tokio::test]
    async fn calls_go_by_name_then_by_depth() {
        let plain = three().build().unwrap();
        let chosen = three().default_model("b").build().unwrap();
        let deep = || three().default_from_depth(1, "b").default_from_depth(3, "c").build();
        let (deep, as_rlm) = (deep().unwrap(), deep().unwrap().with_depths_of_rlm());
        for (router, model, depth, expected) in [
            (&plain, None, 0, "a"),
            (&plain, None, 5, "a"),
            (&plain, Some("c"), 1, "c"),
            (&plain, Some("x"), 1, "a"),
            (&plain, Some(""), 1, "a"),
            (&chosen, None, 1, "b"),
            (&chosen, Some("x"), -1, "b"),
            (&deep, None, -1, "a"),
            (&deep, None, 0, "a"),
            (&deep, None, 1, "b"),
            (&deep, None, 2, "b"),
            (&deep, Some("x"), 2, "b"),
            (&deep, Some("a"), 2, "a"),
            (&deep, None, 3, "c"),
            (&deep, None, i32::MAX, "c"),
            (&as_rlm, None, -1, "a"),
            (&as_rlm, None, 0, "a"),
            (&as_rlm, Some("x"), 1, "b"),
            (&as_rlm, None, 2, "a"),
            (&as_rlm, Some("x"), 3, "a"),
            (&as_rlm, Some("c"), 3, "c"),
        ] {
            let completion = router.complete(&request("hi", model, depth)).await.unwrap();
            assert_eq!(completion.response, format!("{expected}: hi"), "{model:?} {depth}");
            assert_eq!(completion.model, model.unwrap_or(expected), "{model:?} {depth}");
        }
        let calls: Vec<_> = deep.usage().into_models().into_iter().map(|m| m.calls).collect();
        assert_eq!(calls, [3, 3, 2]);
    }

    #[tokio::test]
    async fn a_batch_stays_whole_or_is_put_together_again() {
        let (a, b) = (Named::new("a"), Named::new("b"));
        let router =
            ModelRouter::builder().model("a", a.clone()).model("b", b.clone()).build().unwrap();
        assert_eq!(router.complete_batch(&[], 4).await, []);
        let same: Vec<_> = ["1", "fail", "3"].map(|text| request(text, Some("x"), 1)).into();
        let results = router.complete_batch(&same, 4).await;
        assert_eq!(results[1], Err(LmError::new("failed")));
        assert_eq!(results[2].as_ref().unwrap().model, "x");

        let names = [Some("b"), None, Some("b"), Some("a")];
        let mixed: Vec<_> = names.iter().map(|name| request("hi", *name, 1)).collect();
        let results = router.complete_batch(&mixed, 4).await;
        let texts: Vec<_> = results.into_iter().map(|result| result.unwrap().response).collect();
        assert_eq!(texts, ["b: hi", "a: hi", "b: hi", "a: hi"]);
        assert_eq!(*a.batches.lock().unwrap(), [3, 2]);
        assert_eq!(*b.batches.lock().unwrap(), [2]);
        assert_eq!(router.usage().calls(), 6);
    }

    #[test]
    fn a_model_with_sessions_of_its_own_is_known_by_its_router() {
        struct Nesting;
        #[async_trait]
        impl LmHandler for Nesting {
            fn nests(&self, kind: LmKind) -> bool {
                kind == LmKind::Rlm
            }

            async fn complete(&self, _request: &LmRequest) -> Result<LmCompletion, LmError> {
                Ok(LmCompletion::default())
            }
        }
        let plain = || ModelRouter::builder().model("plain", Arc::new(ScriptedHandler::echo()));
        let nesting = plain().model("nesting", Arc::new(Nesting)).build().unwrap();
        let plain = plain().build().unwrap();
        for kind in [LmKind::Llm, LmKind::Rlm] {
            assert_eq!(nesting.nests(kind), kind == LmKind::Rlm);
            assert!(!plain.nests(kind));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (builder, expected) in [
            (ModelRouter::builder(), "models: there is none; add one"),
            (three().model(" ", Named::new("")), "models: a model has an empty name"),
            (three().model("b", Named::new("")), "model \"b\": two models have this name;"),
            (
                three().default_model("x"),
                "default model \"x\": there is no model of this name, only a, b, c",
            ),
            (three().default_from_depth(1, "y"), "default model \"y\": there is no model"),
            (
                three().default_from_depth(1, "a").default_from_depth(1, "b"),
                "default model: there are two for depth 1;",
            ),
        ] {
            let error = builder.build().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
