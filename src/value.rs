//! Values that cross between host and guest.

use std::collections::BTreeMap;

use serde_json::Value as Json;

/// A Python value as the host sees it: JSON's types, bytes, and text that Rust can't hold.
///
/// ```
/// use kaa::Value;
///
/// let value = Value::from(serde_json::json!({"rows": [1, 2.5, null]}));
/// assert_eq!(Value::from("text"), Value::Str("text".into()));
/// assert_eq!(value.to_json().unwrap().to_string(), r#"{"rows":[1,2.5,null]}"#);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// `None`.
    None,
    /// `bool`.
    Bool(bool),
    /// `int` within 64 bits.
    Int(i64),
    /// A larger `int`, in decimal or `0x` hexadecimal digits, with an optional sign.
    BigInt(String),
    /// `float`, also not-a-number and the infinities.
    Float(f64),
    /// `str`.
    Str(String),
    /// A `str` with lone surrogates, as generalized UTF-8 (WTF-8, Python's `surrogatepass`).
    Wtf8(Vec<u8>),
    /// `bytes`, from the guest also `bytearray` and `memoryview`.
    Bytes(Vec<u8>),
    /// `list`, from the guest also `tuple`, `set` and numpy arrays.
    List(Vec<Value>),
    /// `dict`; keys that aren't `str` become text as `json.dumps` does it.
    Map(BTreeMap<String, Value>),
}

impl Value {
    /// The value as JSON; `None` when something in it has no JSON form (bytes, infinities, …).
    #[must_use]
    pub fn to_json(&self) -> Option<Json> {
        Some(match self {
            Self::None => Json::Null,
            Self::Bool(value) => Json::Bool(*value),
            Self::Int(value) => Json::from(*value),
            Self::Float(value) => Json::Number(serde_json::Number::from_f64(*value)?),
            Self::Str(text) => Json::String(text.clone()),
            Self::List(items) => {
                Json::Array(items.iter().map(Self::to_json).collect::<Option<_>>()?)
            }
            Self::Map(map) => Json::Object(
                map.iter()
                    .map(|(key, value)| Some((key.clone(), value.to_json()?)))
                    .collect::<Option<_>>()?,
            ),
            Self::BigInt(_) | Self::Wtf8(_) | Self::Bytes(_) => return None,
        })
    }

    /// The name of its type in Python.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::BigInt(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) | Self::Wtf8(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Map(_) => "dict",
        }
    }

    /// The text of a `str`.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The number of an `int` within 64 bits.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }
}

impl From<Json> for Value {
    fn from(json: Json) -> Self {
        match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(value),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), _, _) => Self::Int(value),
                (None, Some(value), _) => Self::BigInt(value.to_string()),
                (None, None, value) => Self::Float(value.unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::Str(text),
            Json::Array(items) => Self::List(items.into_iter().map(Self::from).collect()),
            Json::Object(map) => {
                Self::Map(map.into_iter().map(|(key, value)| (key, value.into())).collect())
            }
        }
    }
}

macro_rules! value_from {
    ($($from:ty => |$value:ident| $into:expr),+ $(,)?) => {
        $(impl From<$from> for Value {
            fn from($value: $from) -> Self {
                $into
            }
        })+
    };
}

value_from! {
    () => |_value| Self::None,
    bool => |value| Self::Bool(value),
    i64 => |value| Self::Int(value),
    i32 => |value| Self::Int(value.into()),
    u32 => |value| Self::Int(value.into()),
    f64 => |value| Self::Float(value),
    &str => |value| Self::Str(value.into()),
    String => |value| Self::Str(value),
    Vec<u8> => |value| Self::Bytes(value),
    &[u8] => |value| Self::Bytes(value.into()),
    Vec<Value> => |value| Self::List(value),
    BTreeMap<String, Value> => |value| Self::Map(value),
}
