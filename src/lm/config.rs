//! Models as a file describes them.

mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    AnthropicHandler, LmHandler, LmToken, ModelRouter, OpenAiHandler, ScriptedHandler, Secret,
    SocketHandler, UpstreamOptions,
};
use crate::error::{Error, Result};

/// Models by name, and which of them answer calls that name none.
///
/// As a file it is TOML; unknown keys are refused:
///
/// ```toml
/// default = "big"            # for calls that name no model; needed when there are several
/// sub = "small"              # for those from cells: depth 1 and deeper; default: as `default`
///
/// [models.big]
/// provider = "openai"        # any server with OpenAI's chat completions
/// model = "gpt-5"            # its name there; default: the table's name
///
/// [models.small]
/// provider = "anthropic"
/// model = "claude-haiku-4-5"
/// key_env = "MY_KEY"         # the variable that holds the key, or `key_file`: a file
/// input_price = 1.0          # US dollars per million tokens
/// output_price = 5.0
/// max_output_tokens = 8192
/// timeout_s = 300            # of a call, with all tries
/// try_timeout_s = 120        # of one of them
/// connect_timeout_s = 10
/// retries = 4
/// concurrency = 256          # calls at once
/// max_answer_bytes = 16777216
/// remote_parts = false       # true: cells may name images by URL, which the server then fetches
/// parameters = { temperature = 0.2 }
///
/// [models.local]
/// provider = "openai"
/// base_url = "http://127.0.0.1:8000/v1"
///
/// [models.rules]
/// provider = "script"
/// file = "examples/packages.lm.json"
///
/// [models.other]
/// provider = "socket"        # RLM's protocol
/// address = "127.0.0.1:4242"
/// key_file = "token"         # or `key_env`: where the server's token is, if it wants one
/// ```
///
/// A key is looked for in `OPENAI_API_KEY` or `ANTHROPIC_API_KEY`, but only for that provider itself:
/// with another `base_url` none is sent unless `key_env` or `key_file` names it. White space around a
/// key is left out.
///
/// # Example
///
/// ```
/// use kaa::lm::{ModelSource, ModelsConfig};
///
/// # fn main() -> kaa::Result<()> {
/// let config = ModelsConfig::from_toml(r#"
///     [models.big]
///     provider = "openai"
/// "#)?;
/// // The caller decides what may be read.
/// let router = config.router(|source| Ok(match source {
///     ModelSource::Variable("OPENAI_API_KEY") => Some("sk-1".to_owned()),
///     _ => None,
/// }))?;
/// assert_eq!(router.default_model(1), "big");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelsConfig {
    /// For calls that name no model that is known. May be `None` when there is one model.
    pub default: Option<String>,
    /// For those of depth 1 and deeper, if it is another.
    pub sub: Option<String>,
    /// The models, by the names that calls give.
    pub models: BTreeMap<String, ModelConfig>,
}

/// One model: who answers for it.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// A server with OpenAI's chat completions.
    OpenAi(HttpModel),
    /// A server with Anthropic's messages.
    Anthropic(HttpModel),
    /// A file of rules, for [`ScriptedHandler`].
    Script(PathBuf),
    /// A server of RLM's protocol, for [`SocketHandler`].
    Socket {
        /// `HOST:PORT`.
        address: String,
        /// Where the token is that it wants.
        token: KeySource,
    },
}

/// A model at a server.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpModel {
    /// Its name at the server.
    pub model: String,
    /// Where the key is.
    pub key: KeySource,
    /// All else; `key` and `key_hint` are filled in from the source of the key.
    pub options: UpstreamOptions,
}

/// Where a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// Nowhere: none is sent.
    None,
    /// In this variable of the environment.
    Variable(String),
    /// In this file.
    File(PathBuf),
}

/// Something that a configuration names and doesn't hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelSource<'a> {
    /// A variable of the environment that holds a key.
    Variable(&'a str),
    /// A file that holds a key.
    KeyFile(&'a Path),
    /// A file of rules.
    Script(&'a Path),
}

impl ModelsConfig {
    /// Reads a file's text. The only model of a file is its `default`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the table and the key.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::ModelsConfig;
    ///
    /// let error = ModelsConfig::from_toml("[models.a]\nprovider = \"openai\"\ntimeout_s = 0");
    /// assert_eq!(error.unwrap_err().to_string(), "models.a.timeout_s: it must be more than 0");
    /// ```
    pub fn from_toml(text: &str) -> Result<Self> {
        let mut config = file::read(text)?;
        for (key, name) in [("default", &config.default), ("sub", &config.sub)] {
            if let Some(name) = name
                && !config.models.contains_key(name)
            {
                return Err(Error::invalid(key, format!("there is no table [models.{name}]")));
            }
        }
        if config.models.is_empty() {
            let reason = "there is no model; begin one with a line such as [models.big]";
            return Err(Error::invalid("models", reason));
        }
        // Models that are added later don't take its place.
        if config.default.is_none() && config.models.len() == 1 {
            config.default = config.models.keys().next().cloned();
        }
        Ok(config)
    }

    /// Makes the handlers and puts them behind one. `read` gives what the configuration names: the
    /// value of a variable or `None` if it isn't set, or the text of a file.
    ///
    /// # Errors
    ///
    /// Those of `read`; [`Error::Invalid`] if a key is missing or a handler can't be made, with the
    /// model's name, and if there are several models and no [`default`](Self::default).
    pub fn router(
        &self,
        mut read: impl FnMut(ModelSource<'_>) -> Result<Option<String>>,
    ) -> Result<ModelRouter> {
        if self.default.is_none() && self.models.len() > 1 {
            let reason = "there are several models: say which one answers calls that name none";
            return Err(Error::invalid("default", reason));
        }
        let mut builder = ModelRouter::builder();
        for (name, model) in &self.models {
            builder = builder.model(name, model.handler(name, &mut read)?);
        }
        if let Some(name) = &self.default {
            builder = builder.default_model(name);
        }
        if let Some(name) = &self.sub {
            builder = builder.default_from_depth(1, name);
        }
        builder.build()
    }
}

impl ModelConfig {
    /// Reads `openai:NAME`, `anthropic:NAME`, `script:FILE` or `socket:HOST:PORT`. `base_url` is for
    /// the first two, `key` also for the last, where it is the server's token.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it's none of these.
    ///
    /// # Example
    ///
    /// ```
    /// use kaa::lm::ModelConfig;
    ///
    /// # fn main() -> kaa::Result<()> {
    /// let model = ModelConfig::from_spec("script:rules.json", None, None)?;
    /// assert_eq!(model, ModelConfig::Script("rules.json".into()));
    /// assert_eq!(
    ///     ModelConfig::from_spec("gpt-5", None, None).unwrap_err().to_string(),
    ///     "model \"gpt-5\": write openai:NAME, anthropic:NAME, script:FILE or socket:HOST:PORT"
    /// );
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_spec(spec: &str, base_url: Option<String>, key: Option<KeySource>) -> Result<Self> {
        let refuse = |reason: &str| Err(Error::invalid(format!("model {spec:?}"), reason));
        let (provider, rest) = spec.split_once(':').unwrap_or((spec, ""));
        if rest.is_empty() || !["openai", "anthropic", "script", "socket"].contains(&provider) {
            return refuse("write openai:NAME, anthropic:NAME, script:FILE or socket:HOST:PORT");
        }
        let http = |own: &Own, key: Option<KeySource>| {
            let key = key.unwrap_or_else(|| own.key(base_url.as_deref()));
            let options = UpstreamOptions { base_url, ..UpstreamOptions::default() };
            HttpModel { model: rest.to_owned(), key, options }
        };
        Ok(match provider {
            "openai" => Self::OpenAi(http(&OPENAI, key)),
            "anthropic" => Self::Anthropic(http(&ANTHROPIC, key)),
            "script" => Self::Script(rest.into()),
            _ => Self::Socket { address: rest.into(), token: key.unwrap_or(KeySource::None) },
        })
    }

    fn handler(
        &self,
        name: &str,
        read: &mut dyn FnMut(ModelSource<'_>) -> Result<Option<String>>,
    ) -> Result<Arc<dyn LmHandler>> {
        let named = |error| match error {
            Error::Invalid { what, reason } => {
                Error::invalid(format!("model {name:?}"), format!("{what}: {reason}"))
            }
            other => other,
        };
        Ok(match self {
            Self::OpenAi(http) => {
                let options = http.resolve(name, read)?;
                Arc::new(OpenAiHandler::new(&http.model, options).map_err(named)?)
            }
            Self::Anthropic(http) => {
                let options = http.resolve(name, read)?;
                Arc::new(AnthropicHandler::new(&http.model, options).map_err(named)?)
            }
            Self::Script(path) => {
                let wrong =
                    |reason: String| named(Error::invalid(path.display().to_string(), reason));
                let text = read(ModelSource::Script(path))?
                    .ok_or_else(|| wrong("there is no such file".into()))?;
                Arc::new(ScriptedHandler::from_json(&text).map_err(|e| wrong(e.to_string()))?)
            }
            Self::Socket { address, token } => {
                let mut socket = SocketHandler::new(address).map_err(named)?;
                if let Some((token, _)) = token.resolve(name, read)? {
                    socket = socket.with_token(LmToken::new(token).map_err(named)?);
                }
                Arc::new(socket)
            }
        })
    }
}

impl HttpModel {
    /// The options with the key in them.
    fn resolve(
        &self,
        name: &str,
        read: &mut dyn FnMut(ModelSource<'_>) -> Result<Option<String>>,
    ) -> Result<UpstreamOptions> {
        let mut options = self.options.clone();
        match self.key.resolve(name, read)? {
            None => options.key_hint = "no key was sent; say where it is".to_owned(),
            Some((key, place)) => {
                options.key = Some(Secret::new(key));
                options.key_hint = format!("is {place} right?");
            }
        }
        Ok(options)
    }
}

impl KeySource {
    /// The key, and what the user calls its place.
    fn resolve(
        &self,
        name: &str,
        read: &mut dyn FnMut(ModelSource<'_>) -> Result<Option<String>>,
    ) -> Result<Option<(String, String)>> {
        let (source, place) = match self {
            Self::None => return Ok(None),
            Self::Variable(variable) => (ModelSource::Variable(variable), variable.clone()),
            Self::File(path) => (ModelSource::KeyFile(path), path.display().to_string()),
        };
        let text = read(source)?.unwrap_or_default();
        // Editors and shells leave line ends and blanks around it; no key has any.
        let key = text.trim();
        if !key.is_empty() {
            return Ok(Some((key.to_owned(), place)));
        }
        let what = match self {
            Self::File(_) => "is empty; write the key into it",
            _ => "is not set; set it to the key",
        };
        let reason = format!("{place} {what}, or name another variable or file of the key");
        Err(Error::invalid(format!("model {name:?}"), reason))
    }
}

/// What a provider has of its own.
struct Own {
    base_url: &'static str,
    variable: &'static str,
}

const OPENAI: Own = Own { base_url: OpenAiHandler::BASE_URL, variable: "OPENAI_API_KEY" };
const ANTHROPIC: Own = Own { base_url: AnthropicHandler::BASE_URL, variable: "ANTHROPIC_API_KEY" };

impl Own {
    /// Where the key is unless it's said: another server must not get the provider's.
    fn key(&self, base_url: Option<&str>) -> KeySource {
        match base_url {
            Some(url) if url.trim_end_matches('/') != self.base_url => KeySource::None,
            _ => KeySource::Variable(self.variable.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::lm::{LmKind, LmRequest, Price, Prompt};

    #[test]
    fn a_file_says_all() {
        let config = ModelsConfig::from_toml(
            r#"
            default = "big"
            sub = "rules"
            [models.big]
            provider = "openai"
            model = "gpt-5"
            base_url = "http://127.0.0.1:1/v1"
            key_env = "KEY"
            input_price = 1.25
            output_price = 10
            max_output_tokens = 100
            timeout_s = 0.5
            try_timeout_s = 0.25
            connect_timeout_s = 2
            retries = 0
            concurrency = 9
            max_answer_bytes = 1000
            remote_parts = true
            [models.big.parameters]
            temperature = 0.2
            [models.claude]
            provider = "anthropic"
            key_file = "key"
            [models.rules]
            provider = "script"
            file = "rules.json"
            [models."a.b"]
            provider = "socket"
            address = "127.0.0.1:2"
            key_env = "TOKEN"
            "#,
        )
        .unwrap();
        assert_eq!(
            (config.default.as_deref(), config.sub.as_deref()),
            (Some("big"), Some("rules"))
        );
        let ModelConfig::OpenAi(big) = &config.models["big"] else { panic!() };
        assert_eq!((big.model.as_str(), &big.key), ("gpt-5", &KeySource::Variable("KEY".into())));
        let options = &big.options;
        assert_eq!(options.base_url.as_deref(), Some("http://127.0.0.1:1/v1"));
        assert_eq!(options.price, Some(Price { input: 1.25, output: 10.0 }));
        assert_eq!(options.output_tokens_max, Some(100));
        assert_eq!(options.timeout, Duration::from_millis(500));
        assert_eq!(options.try_timeout, Duration::from_millis(250));
        assert_eq!(options.connect_timeout, Duration::from_secs(2));
        assert_eq!((options.retries.max, options.concurrency), (0, 9));
        assert_eq!((options.answer_bytes_max, options.remote_parts), (1000, true));
        assert_eq!(options.parameters["temperature"], 0.2);
        let ModelConfig::Anthropic(claude) = &config.models["claude"] else { panic!() };
        let standard = UpstreamOptions::default();
        let key = KeySource::File("key".into());
        assert_eq!(claude, &HttpModel { model: "claude".into(), key, options: standard });
        assert_eq!(config.models["rules"], ModelConfig::Script("rules.json".into()));
        let (address, token) = ("127.0.0.1:2".into(), KeySource::Variable("TOKEN".into()));
        assert_eq!(config.models["a.b"], ModelConfig::Socket { address, token });
    }

    #[test]
    fn keys_go_only_where_they_belong() {
        let variable = |name: &str| KeySource::Variable(name.into());
        for (spec, base_url, key, expected) in [
            ("openai:m", None, None, variable("OPENAI_API_KEY")),
            ("anthropic:m", None, None, variable("ANTHROPIC_API_KEY")),
            ("openai:m", Some("https://api.openai.com/v1/"), None, variable("OPENAI_API_KEY")),
            ("openai:m", Some("https://elsewhere.example/v1"), None, KeySource::None),
            ("anthropic:m", Some("http://127.0.0.1:1"), None, KeySource::None),
            ("openai:m", Some("http://h/v1"), Some(variable("K")), variable("K")),
        ] {
            let model = ModelConfig::from_spec(spec, base_url.map(str::to_owned), key).unwrap();
            let (ModelConfig::OpenAi(http) | ModelConfig::Anthropic(http)) = model else {
                panic!("{spec}");
            };
            assert_eq!((http.model.as_str(), http.key), ("m", expected), "{spec} {base_url:?}");
        }
        for spec in ["", "openai", "openai:", ":x", "gemini:x"] {
            assert!(ModelConfig::from_spec(spec, None, None).is_err(), "{spec}");
        }
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        let model = |lines: &str| format!("[models.a]\nprovider = \"openai\"\n{lines}");
        for (text, expected) in [
            ("".into(), "models: there is no model; begin one with a line such as [models.big]"),
            ("a = 1".into(), "models file: TOML parse error at line 1, column 1"),
            ("models = 1".into(), "models file: TOML parse error"),
            ("[models.a]".into(), "models.a: missing field `provider`"),
            ("models.a = 1".into(), "models.a: invalid type: integer `1`"),
            (
                "[models.a]\nprovider = \"x\"".into(),
                "models.a: unknown variant `x`, expected one of",
            ),
            ("[models.a]\nprovider = \"script\"".into(), "models.a: missing field `file`"),
            (
                "[models.a]\nprovider = \"script\"\nfile = \"f\"\nmodel = \"m\"".into(),
                "models.a: unknown field `model`, expected `file`",
            ),
            (model("modle = \"m\""), "models.a: unknown field `modle`, expected one of `model`"),
            (model("retries = -1"), "models.a: invalid value: integer `-1`"),
            (model("timeout_s = -1"), "models.a.timeout_s: it must be a number of seconds"),
            (model("timeout_s = nan"), "models.a.timeout_s: it must be a number of seconds"),
            (model("timeout_s = 0"), "models.a.timeout_s: it must be more than 0"),
            (model("try_timeout_s = 0"), "models.a.try_timeout_s: it must be more than 0"),
            (model("timeout_s = 1e9"), "models.a.timeout_s: it must be at most 24 hours"),
            (model("concurrency = 0"), "models.a.concurrency: it must be between 1 and 65536"),
            (model("max_output_tokens = 0"), "models.a.max_output_tokens: it must be more than"),
            (model("input_price = 1"), "models.a.input_price: give it and `output_price`, or"),
            (
                model("input_price = -1\noutput_price = 1"),
                "models.a.input_price: it must be a number that is not negative",
            ),
            (
                model("parameters = { model = 1 }"),
                "models.a.parameters.model: the handler sets it itself; leave it out",
            ),
            (
                model("key_env = \"K\"\nkey_file = \"k\""),
                "models.a.key_file: there is `key_env` too; leave out one",
            ),
            (format!("default = \"b\"\n{}", model("")), "default: there is no table [models.b]"),
            (format!("sub = \"b\"\n{}", model("")), "sub: there is no table [models.b]"),
        ] {
            let error = ModelsConfig::from_toml(&text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}\n{error}");
        }
    }

    #[test]
    fn the_only_model_is_the_default_and_of_several_none() {
        let model = |name: &str| format!("[models.{name}]\nprovider = \"script\"\nfile = \"f\"\n");
        let rules = |_: ModelSource<'_>| Ok(Some("{}".to_owned()));
        let mut one = ModelsConfig::from_toml(&model("m")).unwrap();
        assert_eq!(one.default.as_deref(), Some("m"));
        one.models.insert("a".into(), ModelConfig::Script("f".into()));
        assert_eq!(one.router(rules).unwrap().default_model(0), "m");

        let mut several = ModelsConfig::from_toml(&(model("m") + &model("n"))).unwrap();
        let error = several.router(rules).unwrap_err().to_string();
        assert!(error.starts_with("default: there are several models: say which one"), "{error}");
        several.default = Some("n".into());
        assert_eq!(several.router(rules).unwrap().default_model(0), "n");
    }

    #[tokio::test]
    async fn what_is_named_is_read_by_the_caller() {
        let text = r#"
            default = "rules"
            [models.rules]
            provider = "script"
            file = "rules.json"
            [models.keyed]
            provider = "openai"
            base_url = "http://127.0.0.1:1/v1"
            key_file = "key"
        "#;
        let config = ModelsConfig::from_toml(text).unwrap();
        let rules = r#"{"default": {"response": "by rule"}}"#;
        let read = |key: Option<&str>, rules: &str| {
            let (key, rules) = (key.map(str::to_owned), rules.to_owned());
            config.router(move |source| {
                Ok(match source {
                    ModelSource::Script(path) if path == Path::new("rules.json") => {
                        Some(rules.clone())
                    }
                    ModelSource::KeyFile(path) if path == Path::new("key") => key.clone(),
                    _ => None,
                })
            })
        };
        let router = read(Some("k"), rules).unwrap();
        let prompt = Prompt::Text("hi".into());
        let request = LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 };
        assert_eq!(router.complete(&request).await.unwrap().response, "by rule");
        assert!(read(Some(" \tk \r\n"), rules).is_ok());
        for (key, rules, expected) in [
            (None, rules, "model \"keyed\": key is empty; write the key into it, or name"),
            (Some(" \r\n"), rules, "model \"keyed\": key is empty; write the key into it, or name"),
            (Some("a\nb"), rules, "model \"keyed\": header authorization: the key or value has"),
            (Some("k"), "{", "model \"rules\": rules.json: LM script: EOF while parsing"),
        ] {
            let error = read(key, rules).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
