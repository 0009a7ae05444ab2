//! Values in cases: TOML, with a table of one key for what TOML has no form for.

use serde_json::{Value as Json, json};

use crate::value::Value;

/// Bytes that a case may repeat a text to.
const REPEATED_BYTES_MAX: usize = 256 << 20;

/// The value that TOML writes. What isn't in TOML is a table of one key: `{"$none" = true}`,
/// `{"$bytes" = "00ff"}`, `{"$wtf8" = "eda080"}` (both hexadecimal), `{"$int" = "123…"}`, and
/// `{"$repeat" = ["text", 1000]}`.
pub(super) fn value_of(toml: &toml::Value) -> Result<Value, String> {
    Ok(match toml {
        toml::Value::Boolean(value) => Value::Bool(*value),
        toml::Value::Integer(value) => Value::Int(*value),
        toml::Value::Float(value) => Value::Float(*value),
        toml::Value::String(text) => Value::Str(text.clone()),
        toml::Value::Array(items) => {
            Value::List(items.iter().map(value_of).collect::<Result<_, _>>()?)
        }
        toml::Value::Table(table) => {
            let mut entries = table.iter();
            if let (Some((name, value)), None) = (entries.next(), entries.next())
                && let Some(kind) = name.strip_prefix('$')
            {
                return special(kind, value);
            }
            let entries = table.iter().map(|(key, value)| Ok((key.clone(), value_of(value)?)));
            Value::Map(entries.collect::<Result<_, String>>()?)
        }
        toml::Value::Datetime(_) => return Err("a date has no value in Python".into()),
    })
}

fn special(kind: &str, value: &toml::Value) -> Result<Value, String> {
    let text = || value.as_str().ok_or_else(|| format!("`${kind}` takes a text"));
    Ok(match kind {
        "none" => Value::None,
        "bytes" => Value::Bytes(hexadecimal(text()?)?),
        "wtf8" => Value::Wtf8(hexadecimal(text()?)?),
        "int" => Value::BigInt(text()?.to_owned()),
        "repeat" => Value::Str(repeated(value)?),
        _ => {
            let known = "$none, $bytes, $wtf8, $int and $repeat";
            return Err(format!("unknown kind of value `${kind}`; known are {known}"));
        }
    })
}

fn hexadecimal(text: &str) -> Result<Vec<u8>, String> {
    let digits: Option<Vec<u8>> = text.bytes().map(digit).collect();
    match digits {
        Some(digits) if digits.len().is_multiple_of(2) => {
            Ok(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
        }
        _ => Err(format!("`{text}` is not pairs of hexadecimal digits")),
    }
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn repeated(value: &toml::Value) -> Result<String, String> {
    let form = || "`$repeat` takes a text and how often: [\"text\", 1000]".to_owned();
    let [text, times] = &value.as_array().ok_or_else(form)?[..] else { return Err(form()) };
    let (Some(text), Some(times)) = (text.as_str(), times.as_integer()) else {
        return Err(form());
    };
    let times = usize::try_from(times).map_err(|_| form())?;
    match text.len().checked_mul(times) {
        Some(bytes) if bytes <= REPEATED_BYTES_MAX => Ok(text.repeat(times)),
        _ => Err(format!("`$repeat` makes at most {REPEATED_BYTES_MAX} bytes")),
    }
}

/// The value as JSON, for comparing and showing.
pub(super) fn shown(value: &Value) -> Json {
    match value {
        Value::None => json!({ "$none": true }),
        Value::Float(number) if !number.is_finite() => json!({ "$float": number.to_string() }),
        Value::BigInt(digits) => json!({ "$int": digits }),
        Value::Wtf8(bytes) => json!({ "$wtf8": hexadecimal_of(bytes) }),
        Value::Bytes(bytes) => json!({ "$bytes": hexadecimal_of(bytes) }),
        Value::List(items) => items.iter().map(shown).collect(),
        Value::Map(map) => {
            Json::Object(map.iter().map(|(key, value)| (key.clone(), shown(value))).collect())
        }
        Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Str(_) => {
            value.to_json().unwrap_or_default()
        }
    }
}

fn hexadecimal_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// TOML as JSON; both are data of the same kind but for dates, which cases don't need.
pub(super) fn json_of(toml: &toml::Value) -> Result<Json, String> {
    Ok(match toml {
        toml::Value::Boolean(value) => Json::from(*value),
        toml::Value::Integer(value) => Json::from(*value),
        toml::Value::Float(value) => Json::from(*value),
        toml::Value::String(text) => Json::from(text.as_str()),
        toml::Value::Array(items) => {
            Json::Array(items.iter().map(json_of).collect::<Result<_, _>>()?)
        }
        toml::Value::Table(table) => {
            let entries = table.iter().map(|(key, value)| Ok((key.clone(), json_of(value)?)));
            Json::Object(entries.collect::<Result<_, String>>()?)
        }
        toml::Value::Datetime(_) => return Err("a date has no JSON".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Value, String> {
        let table: toml::Table = format!("v = {text}").parse().unwrap();
        value_of(&table["v"])
    }

    #[test]
    fn what_toml_lacks_is_a_table_of_one_key() {
        for (text, value) in [
            ("{'$none' = true}", Value::None),
            ("{'$bytes' = '00fF'}", Value::Bytes(vec![0, 255])),
            ("{'$int' = '12345678901234567890'}", Value::BigInt("12345678901234567890".into())),
            ("{'$repeat' = ['ab', 3]}", Value::from("ababab")),
            ("[1, {a = 0.5}]", {
                let map = Value::Map([("a".to_owned(), Value::Float(0.5))].into());
                Value::List(vec![Value::Int(1), map])
            }),
        ] {
            assert_eq!(read(text).unwrap(), value, "{text}");
        }
        for text in [
            "{'$bytes' = '0'}",
            "{'$bytes' = 'zz'}",
            "{'$new' = 1}",
            "{'$repeat' = ['x']}",
            "{'$repeat' = ['x', -1]}",
            "{'$repeat' = ['xxxx', 4611686018427387904]}",
            "1979-05-27",
        ] {
            read(text).unwrap_err();
        }
    }
}
