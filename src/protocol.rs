//! What host and agent say to each other: messages, and values inside them.
//!
//! A message is `header length: u32 big-endian | header: JSON object, UTF-8 | body: bytes`. The
//! header says what is meant (`op`), the body carries what is long: source, contexts, texts over
//! [`INLINE_CHARS_MAX`] characters, bytes. An empty message is an empty header.
//!
//! The guest always speaks first and the host answers: `next` and `done` ask for the next request
//! and hand in the reply to the last one, `lm`, `tool` and `why` are calls from inside a cell.
//!
//! Inside a header a value is JSON, and an object whose only key begins with `$` is one of the
//! forms of [`encode_value`]. Everything that arrives here is hostile: every offset and length is
//! checked, and nesting is bounded.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::error::{Error, Result};
use crate::value::Value;

/// Largest message from the host. A context of several hundred megabytes has to fit.
pub(crate) const REPLY_BYTES_MAX: usize = 1 << 30;
/// Largest message from the guest: the host holds a copy of it.
pub(crate) const CALL_BYTES_MAX: usize = 256 << 20;
/// Largest header from the guest: what's long is body. Parsed, JSON can take sixteen times its
/// length, so that this bounds what a hostile header costs the host to 256 MiB, for a moment.
const HEADER_BYTES_MAX: usize = 16 << 20;
/// Longer texts travel in the body, where nothing has to be escaped.
const INLINE_CHARS_MAX: usize = 1024;
/// Nesting of values; `serde_json` itself stops at 128.
const DEPTH_MAX: usize = 100;

/// A header and the body that it refers to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Message {
    pub(crate) header: Map<String, Json>,
    pub(crate) body: Vec<u8>,
}

impl Message {
    /// A message whose header is this JSON object.
    pub(crate) fn new(header: Json) -> Self {
        let Json::Object(header) = header else { unreachable!("a header is an object") };
        Self { header, body: Vec::new() }
    }

    /// The bytes of the message; an empty header and body are no bytes at all.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        if self.header.is_empty() && self.body.is_empty() {
            return Vec::new();
        }
        let mut bytes = Vec::with_capacity(256 + self.body.len());
        bytes.extend_from_slice(&[0; 4]);
        serde_json::to_writer(&mut bytes, &self.header).expect("JSON goes into memory");
        let length = (bytes.len() - 4) as u32;
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Reads a message.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when it's truncated, too long, or its header isn't a JSON object.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let (length, rest) = bytes
            .split_first_chunk::<4>()
            .ok_or_else(|| Error::protocol("a message of less than 4 bytes"))?;
        let length = u32::from_be_bytes(*length) as usize;
        if length > HEADER_BYTES_MAX || length > rest.len() {
            return Err(Error::protocol(format!(
                "a header of {length} bytes in a message of {}",
                bytes.len()
            )));
        }
        let (header, body) = rest.split_at(length);
        let header = serde_json::from_slice(header)
            .map_err(|e| Error::protocol(format!("the header is not a JSON object: {e}")))?;
        Ok(Self { header, body: body.to_vec() })
    }

    /// The text under `key`, or nothing.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.header.get(key).and_then(Json::as_str)
    }

    /// Takes the header apart as `T`.
    pub(crate) fn parse<T: for<'de> Deserialize<'de>>(self) -> Result<(T, Vec<u8>)> {
        let parsed = serde_json::from_value(Json::Object(self.header))
            .map_err(|e| Error::protocol(format!("a field of the wrong type: {e}")))?;
        Ok((parsed, self.body))
    }

    /// Puts `value` under `key`, its long parts into the body.
    pub(crate) fn put(&mut self, key: &str, value: &Value) {
        let encoded = encode_value(value, &mut self.body);
        self.header.insert(key.into(), encoded);
    }
}

/// A variable in a report.
#[derive(Debug, Deserialize)]
pub(crate) struct VariableReport {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) type_name: String,
    pub(crate) repr: String,
    #[serde(default)]
    pub(crate) new: bool,
}

/// An exception in a report.
#[derive(Debug, Deserialize)]
pub(crate) struct ExceptionReport {
    #[serde(rename = "type")]
    pub(crate) type_name: String,
    pub(crate) message: String,
    pub(crate) traceback: String,
}

/// The agent's reply to `exec`.
#[derive(Debug, Deserialize)]
pub(crate) struct CellReport {
    pub(crate) outcome: String,
    #[serde(default)]
    pub(crate) exit_code: Option<i64>,
    #[serde(default)]
    pub(crate) value: Option<String>,
    #[serde(default)]
    pub(crate) exception: Option<ExceptionReport>,
    #[serde(default)]
    pub(crate) variables: Vec<VariableReport>,
    #[serde(default)]
    pub(crate) final_answer: Option<String>,
}

/// A call for language models from inside a cell.
#[derive(Debug, Deserialize)]
pub(crate) struct LmCallMessage {
    #[serde(default)]
    pub(crate) kind: String,
    pub(crate) prompts: Vec<Json>,
    #[serde(default)]
    pub(crate) model: Option<String>,
    #[serde(default)]
    pub(crate) batched: bool,
}

/// A host tool call from inside a cell.
#[derive(Debug, Deserialize)]
pub(crate) struct ToolCallMessage {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) args: Vec<Json>,
    #[serde(default)]
    pub(crate) kwargs: Map<String, Json>,
}

fn append(body: &mut Vec<u8>, bytes: &[u8]) -> Json {
    let offset = body.len();
    body.extend_from_slice(bytes);
    json!([offset, bytes.len()])
}

/// Writes a value as header JSON, its long parts into `body`:
///
/// | form | value |
/// |---|---|
/// | `{"$str": [offset, length]}` | text in the body, UTF-8 |
/// | `{"$wtf8": [offset, length]}` | text with lone surrogates in the body |
/// | `{"$bytes": [offset, length]}` | bytes in the body |
/// | `{"$int": "digits"}` | an integer outside 64 bits |
/// | `{"$float": "nan" \| "inf" \| "-inf"}` | what JSON has no number for |
/// | `{"$dict": [[key, value], …]}` | a dict that would look like one of these |
pub(crate) fn encode_value(value: &Value, body: &mut Vec<u8>) -> Json {
    match value {
        Value::None => Json::Null,
        Value::Bool(value) => Json::Bool(*value),
        Value::Int(value) => Json::from(*value),
        Value::BigInt(digits) => json!({ "$int": digits }),
        Value::Float(value) => match serde_json::Number::from_f64(*value) {
            Some(number) => Json::Number(number),
            None if value.is_nan() => json!({ "$float": "nan" }),
            None => json!({ "$float": if *value > 0.0 { "inf" } else { "-inf" } }),
        },
        Value::Str(text) if text.len() <= INLINE_CHARS_MAX => Json::String(text.clone()),
        Value::Str(text) => json!({ "$str": append(body, text.as_bytes()) }),
        Value::Wtf8(bytes) => json!({ "$wtf8": append(body, bytes) }),
        Value::Bytes(bytes) => json!({ "$bytes": append(body, bytes) }),
        Value::List(items) => items.iter().map(|item| encode_value(item, body)).collect(),
        Value::Map(map) => {
            let looks_special = map.len() == 1 && map.keys().all(|key| key.starts_with('$'));
            let pairs = map.iter().map(|(key, value)| (key.clone(), encode_value(value, body)));
            if looks_special {
                let pairs: Vec<Json> = pairs.map(|(key, value)| json!([key, value])).collect();
                json!({ "$dict": pairs })
            } else {
                Json::Object(pairs.collect())
            }
        }
    }
}

/// Reads a value that the guest wrote.
///
/// # Errors
///
/// [`Error::Protocol`] for an unknown form, a range outside the body, or too deep a nesting.
pub(crate) fn decode_value(json: Json, body: &[u8]) -> Result<Value> {
    decode_at_depth(json, body, 0)
}

fn decode_at_depth(json: Json, body: &[u8], depth: usize) -> Result<Value> {
    if depth > DEPTH_MAX {
        return Err(Error::protocol(format!("a value nested more than {DEPTH_MAX} levels deep")));
    }
    match json {
        Json::Array(items) => Ok(Value::List(
            items
                .into_iter()
                .map(|item| decode_at_depth(item, body, depth + 1))
                .collect::<Result<_>>()?,
        )),
        Json::Object(map) => {
            if map.len() == 1
                && let Some((key, inner)) = map.iter().next()
                && key.starts_with('$')
            {
                return decode_special(key, inner, body, depth);
            }
            let mut decoded = BTreeMap::new();
            for (key, item) in map {
                decoded.insert(key, decode_at_depth(item, body, depth + 1)?);
            }
            Ok(Value::Map(decoded))
        }
        plain => Ok(plain.into()),
    }
}

fn decode_special(form: &str, inner: &Json, body: &[u8], depth: usize) -> Result<Value> {
    let unknown = || Error::protocol(format!("a value of the unknown form `{form}`"));
    match form {
        "$str" => {
            // A guest that lies about its text gets replacement characters, not an error.
            Ok(Value::Str(String::from_utf8_lossy(slice(inner, body)?).into_owned()))
        }
        "$wtf8" => Ok(Value::Wtf8(slice(inner, body)?.to_vec())),
        "$bytes" => Ok(Value::Bytes(slice(inner, body)?.to_vec())),
        "$int" => Ok(Value::BigInt(inner.as_str().ok_or_else(unknown)?.to_owned())),
        "$float" => match inner.as_str() {
            Some("nan") => Ok(Value::Float(f64::NAN)),
            Some("inf") => Ok(Value::Float(f64::INFINITY)),
            Some("-inf") => Ok(Value::Float(f64::NEG_INFINITY)),
            _ => Err(unknown()),
        },
        "$dict" => {
            let mut decoded = BTreeMap::new();
            for pair in inner.as_array().ok_or_else(unknown)? {
                match pair.as_array().map(Vec::as_slice) {
                    Some([Json::String(key), value]) => {
                        let value = decode_at_depth(value.clone(), body, depth + 1)?;
                        decoded.insert(key.clone(), value);
                    }
                    _ => return Err(unknown()),
                }
            }
            Ok(Value::Map(decoded))
        }
        _ => Err(unknown()),
    }
}

fn slice<'body>(range: &Json, body: &'body [u8]) -> Result<&'body [u8]> {
    let bound =
        |at: usize| range.get(at).and_then(Json::as_u64).and_then(|n| usize::try_from(n).ok());
    bound(0)
        .zip(bound(1))
        .and_then(|(offset, length)| body.get(offset..offset.checked_add(length)?))
        .ok_or_else(|| Error::protocol("a value refers to bytes outside its message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(value: &Value) -> Value {
        let mut message = Message::default();
        message.put("value", value);
        let back = Message::from_bytes(&message.to_bytes()).unwrap();
        decode_value(back.header["value"].clone(), &back.body).unwrap()
    }

    #[test]
    fn values_survive_the_round_trip() {
        let cases = [
            Value::None,
            Value::from(true),
            Value::from(i64::MIN),
            Value::BigInt("123456789012345678901234567890".into()),
            Value::from(0.1),
            Value::from(f64::NEG_INFINITY),
            Value::from("short \u{e9}\0\r\n"),
            Value::from("long ".repeat(1000)),
            Value::Wtf8(b"\xed\xa0\x80".to_vec()),
            Value::from(vec![0u8, 255]),
            Value::List(vec![Value::from(1i64), Value::List(vec![])]),
            Value::Map([("$str".to_owned(), Value::from("x"))].into()),
            Value::Map([("a".to_owned(), Value::None), ("$b".to_owned(), Value::None)].into()),
        ];
        for case in cases {
            assert_eq!(round_trip(&case), case);
        }
    }

    #[test]
    fn hostile_messages_are_refused() {
        for bytes in
            [&b"abc"[..], b"\0\0\0\x09{}", b"\0\0\0\x02[]", b"\xff\xff\xff\xff{}", b"\0\0\0\x01{"]
        {
            assert!(matches!(Message::from_bytes(bytes), Err(Error::Protocol { .. })), "{bytes:?}");
        }
        let nested = (0..DEPTH_MAX + 2).fold(json!(1), |inner, _| json!([inner]));
        for json in [
            json!({"$str": [0, 9]}),
            json!({"$bytes": [18_446_744_073_709_551_615u64, 2]}),
            json!({"$bytes": [1]}),
            json!({"$what": 1}),
            json!({"$dict": [[1, 2]]}),
            nested,
        ] {
            assert!(
                matches!(decode_value(json.clone(), b"body"), Err(Error::Protocol { .. })),
                "{json}"
            );
        }
    }
}
