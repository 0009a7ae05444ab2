//! What host and agent say to each other: messages, and values inside them.
//!
//! A message is `header length: u32 big-endian | header: JSON object, UTF-8 | body: bytes`. The
//! header says what is meant (`op`), the body carries what is long: source, contexts, texts over
//! [`INLINE_CHARS_MAX`] characters, bytes. An empty message is an empty header.
//!
//! The guest always speaks first and the host answers: `next` and `done` ask for the next request
//! and hand in the reply to the last one, `lm`, `tool` and `why` are calls from inside a cell.
//!
//! What most calls of models are, one text there and one back, needs no header. Such a message is a
//! tag and the text in UTF-8; no header is so long that its length would begin with one:
//!
//! | tag | from | means |
//! |---|---|---|
//! | `L` | guest | `llm_query` of this text, any model |
//! | `R` | guest | `rlm_query` of it |
//! | `T` | host | the answer to a call, which is this text |
//!
//! Inside a header a value is JSON, and an object whose only key begins with `$` is one of the
//! forms of [`encode_value`]. Everything that arrives here is hostile: every offset and length is
//! checked, and nesting is bounded.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::error::{Error, Result};
use crate::value::Value;

/// Largest message from the host. A context of several hundred megabytes has to fit.
pub(crate) const REPLY_BYTES_MAX: usize = 1 << 30;
/// Largest message from the guest: the host holds a copy of it.
pub(crate) const CALL_BYTES_MAX: usize = 256 << 20;
/// Largest header from the guest: what's long is body.
const HEADER_BYTES_MAX: usize = 16 << 20;
/// Longest final answer, in bytes of UTF-8. The agent cuts longer ones.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What a header may take when it's parsed. JSON of seven bytes can become a map of 640.
const PARSED_BYTES_MAX: usize = 256 << 20;
/// Longer texts travel in the body, where nothing has to be escaped.
const INLINE_CHARS_MAX: usize = 1024;
/// Nesting of values; `serde_json` itself stops at 128.
const DEPTH_MAX: usize = 100;

/// Tags: see above.
const LLM_TAG: u8 = b'L';
const RLM_TAG: u8 = b'R';
const TEXT_TAG: u8 = b'T';
const _: () = assert!(HEADER_BYTES_MAX < (LLM_TAG as usize) << 24);

/// What the guest says.
#[derive(Debug, PartialEq)]
pub(crate) enum Call {
    /// Anything with a header.
    Message(Message),
    /// One text for a language model, `recursive` for a child RLM.
    Prompt { recursive: bool, text: String },
}

impl Call {
    /// Reads what the guest says.
    ///
    /// # Errors
    ///
    /// As [`Message::from_bytes`]. A prompt has none: what isn't UTF-8 in it is replaced.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        match bytes {
            [tag @ (LLM_TAG | RLM_TAG), text @ ..] => {
                Ok(Self::Prompt { recursive: *tag == RLM_TAG, text: text_of(text.to_vec()) })
            }
            _ => Message::from_bytes(bytes).map(Self::Message),
        }
    }

    /// Whether language models are asked.
    pub(crate) fn is_for_models(&self) -> bool {
        match self {
            Self::Prompt { .. } => true,
            Self::Message(message) => message.text("op") == Some("lm"),
        }
    }
}

/// A header and the body that it refers to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Message {
    pub(crate) header: Map<String, Json>,
    pub(crate) body: Vec<u8>,
    /// Whether the body is one text, which may reach the guest as such.
    pub(crate) letter: bool,
}

impl Message {
    /// A message whose header is this JSON object.
    pub(crate) fn new(header: Json) -> Self {
        let Json::Object(header) = header else { unreachable!("a header is an object") };
        Self { header, ..Self::default() }
    }

    /// A message that is this text and nothing else.
    pub(crate) fn of_text(text: String) -> Self {
        Self { header: Map::new(), body: text.into_bytes(), letter: true }
    }

    /// The bytes that come before the body; an empty header and body are no bytes at all.
    pub(crate) fn head(&self) -> Cow<'static, [u8]> {
        if self.header.is_empty() && (self.letter || self.body.is_empty()) {
            return Cow::Borrowed(if self.letter { &[TEXT_TAG] } else { &[] });
        }
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        serde_json::to_writer(&mut bytes, &self.header).expect("JSON goes into memory");
        let length = (bytes.len() - 4) as u32;
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes.into()
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
        if parsed_bytes(header) > PARSED_BYTES_MAX {
            return Err(Error::protocol(format!("a header of {length} bytes with too many parts")));
        }
        let header = serde_json::from_slice(header)
            .map_err(|e| Error::protocol(format!("the header is not a JSON object: {e}")))?;
        Ok(Self { header, body: body.to_vec(), letter: false })
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

    /// The answer to a call of a tool: a text is one without a header.
    pub(crate) fn of_value(value: Value) -> Self {
        let Value::Str(text) = value else {
            let mut message = Self::default();
            message.put("value", &value);
            return message;
        };
        Self::of_text(text)
    }

    /// Puts the only value under `key`, its long parts into the body.
    pub(crate) fn put(&mut self, key: &str, value: &Value) {
        let encoded = encode_value(value, &mut self.body);
        self.letter = matches!(value, Value::Str(_));
        self.header.insert(key.into(), encoded);
    }
}

/// At most what this JSON takes when it's parsed, without parsing it: by its brackets and commas
/// outside of strings, and the sizes of `serde_json`'s and `Value`'s maps, lists and elements.
fn parsed_bytes(json: &[u8]) -> usize {
    let (mut bytes, mut in_string, mut escaped) = (json.len(), false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' => bytes += 1300,
            b'[' => bytes += 256,
            b',' => bytes += 128,
            _ => {}
        }
    }
    bytes
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
    /// A text, in the form of a value.
    #[serde(default)]
    pub(crate) final_answer: Option<Json>,
}

/// Reads the final answer of a report with this body.
///
/// # Errors
///
/// [`Error::Protocol`] when it's longer than any agent sends, or no text.
pub(crate) fn decode_answer(json: Json, body: &[u8]) -> Result<String> {
    match decode_value(json, body)? {
        Value::Str(text) if text.len() <= ANSWER_BYTES_MAX => Ok(text),
        Value::Str(text) => Err(Error::protocol(format!("a final answer of {} bytes", text.len()))),
        _ => Err(Error::protocol("a final answer that is no text")),
    }
}

/// A call for language models from inside a cell.
#[derive(Debug, Deserialize)]
pub(crate) struct LmCallMessage {
    #[serde(default)]
    pub(crate) kind: String,
    /// Nothing when the body is the text of the only prompt.
    #[serde(default)]
    pub(crate) prompts: Option<Vec<Json>>,
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
        Value::Str(text) => encode_text(text, body),
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

/// As [`encode_value`], for a text that isn't a [`Value`].
pub(crate) fn encode_text(text: &str, body: &mut Vec<u8>) -> Json {
    if text.len() <= INLINE_CHARS_MAX {
        return Json::String(text.to_owned());
    }
    json!({ "$str": append(body, text.as_bytes()) })
}

/// A text of the guest. One that lies about it gets replacement characters, not an error.
pub(crate) fn text_of(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// Reads a value that the guest wrote.
///
/// # Errors
///
/// [`Error::Protocol`] for an unknown form, a range outside the body, or too deep a nesting.
pub(crate) fn decode_value(json: Json, body: &[u8]) -> Result<Value> {
    decode_within(json, body, &mut { body.len() })
}

/// As [`decode_value`], for several values that share a body: together they may refer to `allowance`
/// bytes of it, so that a message can't name the same long text again and again.
///
/// # Errors
///
/// As [`decode_value`].
pub(crate) fn decode_within(json: Json, body: &[u8], allowance: &mut usize) -> Result<Value> {
    Decoder { body, allowance }.decode(json, 0)
}

struct Decoder<'message> {
    body: &'message [u8],
    allowance: &'message mut usize,
}

impl Decoder<'_> {
    fn decode(&mut self, json: Json, depth: usize) -> Result<Value> {
        if depth > DEPTH_MAX {
            return Err(Error::protocol(format!(
                "a value nested more than {DEPTH_MAX} levels deep"
            )));
        }
        match json {
            Json::Array(items) => {
                let items = items.into_iter().map(|item| self.decode(item, depth + 1));
                Ok(Value::List(items.collect::<Result<_>>()?))
            }
            Json::Object(map) => {
                if map.len() == 1 && map.keys().all(|key| key.starts_with('$')) {
                    let (form, inner) = map.into_iter().next().expect("there is one");
                    return self.special(&form, inner, depth);
                }
                let pairs =
                    map.into_iter().map(|(key, item)| Ok((key, self.decode(item, depth + 1)?)));
                Ok(Value::Map(pairs.collect::<Result<_>>()?))
            }
            plain => Ok(plain.into()),
        }
    }

    fn special(&mut self, form: &str, inner: Json, depth: usize) -> Result<Value> {
        let unknown = || Error::protocol(format!("a value of the unknown form `{form}`"));
        match (form, inner) {
            ("$str", range) => Ok(Value::Str(text_of(self.slice(&range)?.to_vec()))),
            ("$wtf8", range) => Ok(Value::Wtf8(self.slice(&range)?.to_vec())),
            ("$bytes", range) => Ok(Value::Bytes(self.slice(&range)?.to_vec())),
            ("$int", Json::String(digits)) => Ok(Value::BigInt(digits)),
            ("$float", Json::String(name)) => match name.as_str() {
                "nan" => Ok(Value::Float(f64::NAN)),
                "inf" => Ok(Value::Float(f64::INFINITY)),
                "-inf" => Ok(Value::Float(f64::NEG_INFINITY)),
                _ => Err(unknown()),
            },
            ("$dict", Json::Array(pairs)) => {
                let mut decoded = BTreeMap::new();
                for pair in pairs {
                    let Json::Array(pair) = pair else { return Err(unknown()) };
                    let pair: Result<[Json; 2], _> = pair.try_into();
                    let Ok([Json::String(key), value]) = pair else { return Err(unknown()) };
                    decoded.insert(key, self.decode(value, depth + 1)?);
                }
                Ok(Value::Map(decoded))
            }
            _ => Err(unknown()),
        }
    }

    fn slice(&mut self, range: &Json) -> Result<&[u8]> {
        let slice = slice(range, self.body)?;
        *self.allowance = self
            .allowance
            .checked_sub(slice.len())
            .ok_or_else(|| Error::protocol("values refer to the same bytes more than once"))?;
        Ok(slice)
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
        let back = Message::from_bytes(&[&message.head()[..], &message.body].concat()).unwrap();
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
    fn a_text_needs_no_header() {
        let prompt = |recursive, text: &str| Call::Prompt { recursive, text: text.into() };
        for (bytes, call) in [
            (&b"L"[..], prompt(false, "")),
            (b"Lhi", prompt(false, "hi")),
            (b"RL\xc3\xa9", prompt(true, "L\u{e9}")),
            // What a guest claims to be text is made one.
            (b"L\xff\xed\xa0\x80", prompt(false, "\u{fffd}\u{fffd}\u{fffd}\u{fffd}")),
            (b"", Call::Message(Message::default())),
            (
                b"\0\0\0\x02{}hi",
                Call::Message(Message { body: b"hi".to_vec(), ..Message::default() }),
            ),
        ] {
            assert_eq!(Call::from_bytes(bytes).unwrap(), call, "{bytes:?}");
        }
        // The tag of an answer is no guest's.
        for bytes in [&b"Thi"[..], b"T", b"l", b"l    ", b"M\0\0\0{}"] {
            assert!(matches!(Call::from_bytes(bytes), Err(Error::Protocol { .. })), "{bytes:?}");
        }
        for (message, head) in [
            (Message::of_text("hi".into()), &b"T"[..]),
            (Message::of_text(String::new()), b"T"),
            (Message::of_value(Value::from("hi")), b"T"),
            (Message::of_value(Value::None), b"\0\0\0\x0e{\"value\":null}"),
            (Message::default(), b""),
            (Message { body: b"hi".to_vec(), ..Message::default() }, b"\0\0\0\x02{}"),
        ] {
            assert_eq!(message.head(), head, "{message:?}");
        }
    }

    #[test]
    fn a_final_answer_is_a_text_of_bounded_length() {
        let body = vec![b'a'; ANSWER_BYTES_MAX + 1];
        let long = |len: usize| decode_answer(json!({ "$str": [0, len] }), &body);
        assert_eq!(long(ANSWER_BYTES_MAX).unwrap().len(), ANSWER_BYTES_MAX);
        assert_eq!(decode_answer(json!("short"), b"").unwrap(), "short");
        assert!(matches!(long(ANSWER_BYTES_MAX + 1), Err(Error::Protocol { .. })));
        for json in [json!(1), json!({ "$bytes": [0, 1] }), json!({ "$str": [0, 1u64 << 40] })] {
            let result = decode_answer(json.clone(), &body);
            assert!(matches!(result, Err(Error::Protocol { .. })), "{json}");
        }
    }

    #[test]
    fn hostile_messages_are_refused() {
        for bytes in
            [&b"abc"[..], b"\0\0\0\x09{}", b"\0\0\0\x02[]", b"\xff\xff\xff\xff{}", b"\0\0\0\x01{"]
        {
            assert!(matches!(Message::from_bytes(bytes), Err(Error::Protocol { .. })), "{bytes:?}");
        }
        let mut many = b"\0\x10\0\0[".to_vec();
        many.resize(4 + (1 << 20), b'{');
        assert!(matches!(Message::from_bytes(&many), Err(Error::Protocol { .. })));
        let nested = (0..DEPTH_MAX + 2).fold(json!(1), |inner, _| json!([inner]));
        for json in [
            json!([{"$str": [0, 3]}, {"$str": [0, 3]}]),
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
