//! The file's form: what may stand in it, and what that means.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::{ANTHROPIC, HttpModel, KeySource, ModelConfig, ModelsConfig, OPENAI, Own};
use crate::error::{Error, Result};
use crate::lm::{Price, UpstreamOptions};

/// Reads each table; whether they fit together is seen to by the caller.
pub(super) fn read(text: &str) -> Result<ModelsConfig> {
    let file: FileToml = toml::from_str(text)
        .map_err(|e| Error::invalid("models file", e.to_string().trim_end()))?;
    let mut models = BTreeMap::new();
    for (name, table) in file.models {
        let place = format!("models.{name}");
        let model: ModelToml =
            table.try_into().map_err(|e: toml::de::Error| Error::invalid(&place, e.message()))?;
        models.insert(name.clone(), model.check(&name, &place)?);
    }
    Ok(ModelsConfig { default: file.default, sub: file.sub, models })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileToml {
    default: Option<String>,
    sub: Option<String>,
    // Read one by one, so that an error can say which one it is in.
    #[serde(default)]
    models: BTreeMap<String, toml::Value>,
}

#[derive(Deserialize)]
#[serde(tag = "provider", rename_all = "lowercase")]
enum ModelToml {
    OpenAi(Box<HttpToml>),
    Anthropic(Box<HttpToml>),
    Script(ScriptToml),
    Socket(SocketToml),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScriptToml {
    file: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SocketToml {
    address: String,
    key_env: Option<String>,
    key_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpToml {
    model: Option<String>,
    base_url: Option<String>,
    key_env: Option<String>,
    key_file: Option<PathBuf>,
    input_price: Option<f64>,
    output_price: Option<f64>,
    max_output_tokens: Option<u32>,
    timeout_s: Option<f64>,
    try_timeout_s: Option<f64>,
    connect_timeout_s: Option<f64>,
    retries: Option<u32>,
    concurrency: Option<usize>,
    max_answer_bytes: Option<usize>,
    #[serde(default)]
    remote_parts: bool,
    #[serde(default)]
    parameters: Map<String, Json>,
}

impl ModelToml {
    fn check(self, name: &str, place: &str) -> Result<ModelConfig> {
        Ok(match self {
            Self::OpenAi(http) => ModelConfig::OpenAi(http.check(name, place, &OPENAI)?),
            Self::Anthropic(http) => ModelConfig::Anthropic(http.check(name, place, &ANTHROPIC)?),
            Self::Script(script) => ModelConfig::Script(script.file),
            Self::Socket(socket) => {
                let token = key_source(socket.key_env, socket.key_file, place)?;
                let token = token.unwrap_or(KeySource::None);
                ModelConfig::Socket { address: socket.address, token }
            }
        })
    }
}

/// Where a key is, if that is said.
fn key_source(
    variable: Option<String>,
    file: Option<PathBuf>,
    place: &str,
) -> Result<Option<KeySource>> {
    Ok(match (variable, file) {
        (Some(_), Some(_)) => {
            let what = format!("{place}.key_file");
            return Err(Error::invalid(what, "there is `key_env` too; leave out one"));
        }
        (Some(name), None) => Some(KeySource::Variable(name)),
        (None, Some(path)) => Some(KeySource::File(path)),
        (None, None) => None,
    })
}

impl HttpToml {
    fn check(self, name: &str, place: &str, own: &Own) -> Result<HttpModel> {
        let refuse = |key: &str, reason: &str| Error::invalid(format!("{place}.{key}"), reason);
        let seconds = |key: &str, seconds: Option<f64>, standard: Duration| match seconds {
            None => Ok(standard),
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .map_err(|_| refuse(key, "it must be a number of seconds")),
        };
        let key = key_source(self.key_env, self.key_file, place)?
            .unwrap_or_else(|| own.key(self.base_url.as_deref()));
        let price = match (self.input_price, self.output_price) {
            (Some(input), Some(output)) => Some(Price { input, output }),
            (None, None) => None,
            _ => return Err(refuse("input_price", "give it and `output_price`, or neither")),
        };
        let standard = UpstreamOptions::default();
        let mut retries = standard.retries;
        retries.max = self.retries.unwrap_or(retries.max);
        let connect_timeout = standard.connect_timeout;
        let options = UpstreamOptions {
            base_url: self.base_url,
            timeout: seconds("timeout_s", self.timeout_s, standard.timeout)?,
            try_timeout: seconds("try_timeout_s", self.try_timeout_s, standard.try_timeout)?,
            connect_timeout: seconds("connect_timeout_s", self.connect_timeout_s, connect_timeout)?,
            answer_bytes_max: self.max_answer_bytes.unwrap_or(standard.answer_bytes_max),
            concurrency: self.concurrency.unwrap_or(standard.concurrency),
            retries,
            price,
            output_tokens_max: self.max_output_tokens,
            remote_parts: self.remote_parts,
            parameters: self.parameters,
            ..standard
        };
        options.validate().map_err(|error| match error {
            Error::Invalid { what, reason } => refuse(key_of(&what), &reason),
            other => other,
        })?;
        Ok(HttpModel { model: self.model.unwrap_or_else(|| name.to_owned()), key, options })
    }
}

/// What the file calls a field of [`UpstreamOptions`].
fn key_of(field: &str) -> &str {
    match field {
        "timeout" => "timeout_s",
        "try_timeout" => "try_timeout_s",
        "connect_timeout" => "connect_timeout_s",
        "output_tokens_max" => "max_output_tokens",
        "price" => "input_price",
        other => other,
    }
}
