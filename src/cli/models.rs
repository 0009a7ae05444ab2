//! The flags that say who answers language model calls.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use kaa::Error;
use kaa::lm::{
    HttpProxy, KeySource, ModelConfig, ModelRouter, ModelSource, ModelsConfig, Secret,
    SocketHandler,
};

use super::Failure;
use super::flags::reason;

/// No key is longer; a wrong file, such as a device, may be.
const KEY_BYTES_MAX: u64 = 64 << 10;
/// Providers for which there is a base URL.
const SERVERS: [&str; 2] = ["openai", "anthropic"];
/// Providers that want a key or a token.
const KEYED: [&str; 3] = ["openai", "anthropic", "socket"];
/// Hosts that are never reached through a proxy.
const LOOPBACK: &str = "localhost,127.0.0.0/8,::1";

/// Who answers language model calls.
#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(super) struct LmFlags {
    /// Model that answers llm_query: openai:NAME (any server with its chat completions: see
    /// --base-url), anthropic:NAME, script:FILE, socket:HOST:PORT, or a name from --models
    #[arg(long, value_name = "SPEC")]
    model: Option<String>,
    /// Model for calls from cells that name none, if it is another than --model
    #[arg(long, value_name = "SPEC")]
    sub_model: Option<String>,
    /// TOML file of models, their limits and prices; cells ask for them by name. Paths in it begin
    /// at the current directory
    #[arg(long, value_name = "FILE")]
    models: Option<PathBuf>,
    /// Address of the server for openai:NAME (as https://HOST/v1) or anthropic:NAME; it gets no key
    /// unless one is named. As the key it is for --sub-model only if --model has not another provider
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Environment variable that holds the key of --model [default: OPENAI_API_KEY or
    /// ANTHROPIC_API_KEY], or the token that --lm wants
    #[arg(long, value_name = "NAME", conflicts_with = "key_file")]
    key_env: Option<String>,
    /// File that holds the key of --model, or the token that --lm wants
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Address of an RLM LM handler that answers llm_query
    #[arg(
        long, value_name = "HOST:PORT", value_parser = socket,
        conflicts_with_all = ["lm_script", "model", "sub_model", "models", "base_url"]
    )]
    lm: Option<String>,
    /// File of rules that answer llm_query without any model; see examples/packages.lm.json
    #[arg(
        long, value_name = "FILE",
        conflicts_with_all = ["model", "sub_model", "models", "base_url", "key_env", "key_file"]
    )]
    lm_script: Option<PathBuf>,
}

impl LmFlags {
    /// The models that are meant, if any: depth 0 is `--model`, depth 1 `--sub-model`.
    pub(super) fn resolve(self) -> Result<Option<Arc<ModelRouter>>, Failure> {
        Ok(self.router()?.map(Arc::new))
    }

    /// As [`resolve`](Self::resolve), for who has still to say how it routes.
    pub(super) fn router(mut self) -> Result<Option<ModelRouter>, Failure> {
        let flag = if self.lm_script.is_some() { Some("--lm-script") } else { None };
        let Some(mut config) = self.config()? else { return Ok(None) };
        for model in config.models.values_mut() {
            if let ModelConfig::OpenAi(http) | ModelConfig::Anthropic(http) = model {
                http.options.proxy = proxy(http.options.base_url.as_deref());
            }
        }
        let router = config.router(read).map_err(|error| match (flag, error) {
            (Some(flag), Error::Invalid { reason, .. }) => Failure::usage(flag, reason),
            (_, other) => other.into(),
        })?;
        Ok(Some(router))
    }

    fn config(&mut self) -> Result<Option<ModelsConfig>, Failure> {
        if let Some(address) = self.lm.take() {
            let token = self.key().unwrap_or(KeySource::None);
            return Ok(Some(only("lm", ModelConfig::Socket { address, token })));
        }
        if let Some(path) = self.lm_script.take() {
            return Ok(Some(only("script", ModelConfig::Script(path))));
        }
        let mut config = match &self.models {
            Some(path) => {
                let text = text_of(path).map_err(|e| Failure::usage("--models", e))?;
                ModelsConfig::from_toml(&text)
                    .map_err(|e| Failure::usage("--models", format!("{}: {e}", path.display())))?
            }
            None => ModelsConfig::default(),
        };
        for (flag, spec) in [("--model", &self.model), ("--sub-model", &self.sub_model)] {
            let Some(spec) = spec else { continue };
            let name = self.add(&mut config, flag, spec)?;
            match flag {
                "--model" => config.default = Some(name),
                _ => config.sub = Some(name),
            }
        }
        for (flag, is_given, takers) in [
            ("--base-url", self.base_url.is_some(), &SERVERS[..]),
            ("--key-env", self.key_env.is_some(), &KEYED[..]),
            ("--key-file", self.key_file.is_some(), &KEYED[..]),
        ] {
            if is_given && self.owner(takers).is_none() {
                let reason = "it is for --model openai:NAME or anthropic:NAME; give that too";
                return Err(Failure::usage(flag, reason));
            }
        }
        if let (Some(path), None) = (&self.models, &config.default)
            && config.models.len() > 1
        {
            let path = path.display();
            let reason =
                format!("{path}: there are several models; set `default`, or give --model");
            return Err(Failure::usage("--models", reason));
        }
        if self.sub_model.is_some() && self.model.is_none() && self.models.is_none() {
            return Err(Failure::usage("--sub-model", "give --model or --models too"));
        }
        Ok(Some(config).filter(|config| !config.models.is_empty()))
    }

    /// Where the key is, if that is said.
    fn key(&self) -> Option<KeySource> {
        match (&self.key_env, &self.key_file) {
            (Some(name), _) => Some(KeySource::Variable(name.clone())),
            (None, Some(path)) => Some(KeySource::File(path.clone())),
            (None, None) => None,
        }
    }

    /// The provider that a flag is for: the first of --model's and --sub-model's which takes it. Another
    /// one must not see a key, nor a server of the other's.
    fn owner(&self, takers: &[&str]) -> Option<&str> {
        let specs = [&self.model, &self.sub_model].into_iter().flatten();
        specs.map(|spec| provider(spec)).find(|provider| takers.contains(provider))
    }

    /// The name of the model that `spec` means; it's added unless the file has it.
    fn add(&self, config: &mut ModelsConfig, flag: &str, spec: &str) -> Result<String, Failure> {
        if config.models.contains_key(spec) {
            return Ok(spec.to_owned());
        }
        let own = Some(provider(spec));
        let base_url = self.base_url.clone().filter(|_| self.owner(&SERVERS) == own);
        let key = self.key().filter(|_| self.owner(&KEYED) == own);
        let model = ModelConfig::from_spec(spec, base_url, key).map_err(|error| {
            let mut reason = format!("{spec:?}: {}", reason(error));
            if let Some(path) = &self.models {
                let names: Vec<_> = config.models.keys().map(String::as_str).collect();
                reason += &format!(", or a name in {}: {}", path.display(), names.join(", "));
            }
            Failure::usage(flag, reason)
        })?;
        // What cells call it: the name alone, where there is one.
        let name = match &model {
            ModelConfig::OpenAi(http) | ModelConfig::Anthropic(http) => http.model.clone(),
            ModelConfig::Script(_) | ModelConfig::Socket { .. } => spec.to_owned(),
        };
        match config.models.insert(name.clone(), model.clone()) {
            Some(other) if other != model => {
                let reason = format!("another model is called {name:?} already; see --models");
                Err(Failure::usage(flag, reason))
            }
            _ => Ok(name),
        }
    }
}

/// What stands before the colon of `PROVIDER:NAME`; nothing where there is none, as in most names of
/// models in a file.
fn provider(spec: &str) -> &str {
    spec.split_once(':').map_or("", |(provider, _)| provider)
}

fn only(name: &str, model: ModelConfig) -> ModelsConfig {
    let models = [(name.to_owned(), model)].into();
    ModelsConfig { models, ..ModelsConfig::default() }
}

/// What a configuration names: variables of this process and files.
fn read(source: ModelSource<'_>) -> kaa::Result<Option<String>> {
    let unreadable =
        |reason: String| Error::Invalid { what: "a file of --model or --models".into(), reason };
    match source {
        ModelSource::Variable(name) => match std::env::var(name) {
            Ok(key) => Ok(Some(key)),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => {
                Err(Error::Invalid { what: name.to_owned(), reason: "it is not UTF-8".into() })
            }
        },
        ModelSource::KeyFile(path) => key_of(path).map(Some).map_err(unreadable),
        ModelSource::Script(path) => text_of(path).map(Some).map_err(unreadable),
    }
}

fn text_of(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("reading {}: {e}", path.display()))
}

/// What stands in a file for a key.
fn key_of(path: &Path) -> Result<String, String> {
    let mut key = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(KEY_BYTES_MAX + 1).read_to_string(&mut key))
        .map_err(|e| format!("reading {}: {e}", path.display()))?;
    if key.len() as u64 > KEY_BYTES_MAX {
        return Err(format!("{} is too long for a key", path.display()));
    }
    Ok(key)
}

/// The proxy that the environment names for an address; the usual variables, and never for this
/// machine itself. `HTTP_PROXY` in capitals isn't read: a CGI server lets clients set it.
fn proxy(base_url: Option<&str>) -> Option<HttpProxy> {
    let first = |names: &[&'static str]| {
        let values = names.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?)));
        values.into_iter().find(|(_, value)| !value.is_empty())
    };
    let is_plain = base_url.is_some_and(|url| url.starts_with("http:"));
    let (source, url) = match is_plain {
        true => first(&["http_proxy"]),
        false => first(&["https_proxy", "HTTPS_PROXY"]),
    }?;
    let except = match first(&["no_proxy", "NO_PROXY"]) {
        Some((_, hosts)) => format!("{hosts},{LOOPBACK}"),
        None => LOOPBACK.to_owned(),
    };
    Some(HttpProxy { url: Secret::new(url), source: source.to_owned(), except })
}

fn socket(text: &str) -> Result<String, String> {
    SocketHandler::new(text).map(|_| text.to_owned()).map_err(reason)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        lm: LmFlags,
    }

    /// Where the key of a model is looked for, and its base URL or address.
    fn place(model: &ModelConfig) -> (String, String) {
        let (key, url) = match model {
            ModelConfig::OpenAi(http) | ModelConfig::Anthropic(http) => {
                (&http.key, http.options.base_url.clone())
            }
            ModelConfig::Socket { address, token } => (token, Some(address.clone())),
            ModelConfig::Script(_) => (&KeySource::None, None),
        };
        let key = match key {
            KeySource::None => String::new(),
            KeySource::Variable(name) => name.clone(),
            KeySource::File(path) => path.display().to_string(),
        };
        (key, url.unwrap_or_default())
    }

    #[test]
    fn keys_and_servers_stay_with_their_provider() {
        for (model, sub_model, of_model, of_sub_model) in [
            ("openai:a", "openai:b", ("K", "http://h"), ("K", "http://h")),
            ("anthropic:a", "anthropic:b", ("K", "http://h"), ("K", "http://h")),
            ("openai:a", "anthropic:b", ("K", "http://h"), ("ANTHROPIC_API_KEY", "")),
            ("anthropic:a", "openai:b", ("K", "http://h"), ("OPENAI_API_KEY", "")),
            ("openai:a", "socket:h:1", ("K", "http://h"), ("", "h:1")),
            ("openai:a", "script:b", ("K", "http://h"), ("", "")),
            ("script:a", "anthropic:b", ("", ""), ("K", "http://h")),
            // The token is not for the server of a base URL either.
            ("socket:h:1", "openai:b", ("K", "h:1"), ("", "http://h")),
        ] {
            let words =
                ["kaa", "--model", model, "--sub-model", sub_model, "--base-url", "http://h"];
            let words = words.into_iter().chain(["--key-env", "K"]);
            let mut flags = Words::try_parse_from(words).unwrap().lm;
            let Ok(Some(config)) = flags.config() else { panic!("{model} {sub_model}") };
            for (name, expected) in [(config.default, of_model), (config.sub, of_sub_model)] {
                let (key, url) = place(&config.models[&name.unwrap()]);
                assert_eq!((key.as_str(), url.as_str()), expected, "{model} {sub_model}");
            }
        }
    }
}
