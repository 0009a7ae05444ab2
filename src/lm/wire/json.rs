//! JSON as Python's `json` writes it, and what it can read that `serde_json` can't.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// The bytes that Python's `json.dumps` makes: ASCII, with a space after `,` and `:`.
pub(super) fn encode(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, PythonFormatter))?;
    Ok(bytes)
}

/// The length of what [`encode`] makes, without making it.
pub(super) fn encoded_bytes(value: &impl Serialize) -> io::Result<usize> {
    let mut bytes = Counted(0);
    value.serialize(&mut Serializer::with_formatter(&mut bytes, PythonFormatter))?;
    Ok(bytes.0)
}

/// Counts what is written to it.
struct Counted(usize);

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python_float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // Python escapes whatever is not printable ASCII; DEL is the one that serde leaves.
        let is_plain = |c: char| (' '..='~').contains(&c);
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| !is_plain(*c)) {
            writer.write_all(&rest.as_bytes()[..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = &rest[at + c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

/// A finite number as Python's `repr` shows it: the shortest digits, and an exponent of at least two
/// digits for what is below 1e-4 or not below 1e16.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent): (_, i32) = match scientific.split_once('e') {
        Some((digits, exponent)) => (digits, exponent.parse().unwrap_or(0)),
        None => (scientific.as_str(), 0),
    };
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Overwrites each escaped half of a surrogate pair that stands alone by `\ufffd`.
///
/// `serde_json` refuses such text, and one half of an emoji must not cost a whole answer. Working on
/// the bytes covers keys and values alike, and needs no memory: the escapes are equally long.
pub(in crate::lm) fn replace_lone_surrogates(json: &mut [u8]) {
    let mut at = 0;
    while at < json.len() {
        if json[at] != b'\\' {
            at += 1;
            continue;
        }
        match unit_at(json, at) {
            Some(0xd800..=0xdbff) if matches!(unit_at(json, at + 6), Some(0xdc00..=0xdfff)) => {
                at += 12;
            }
            Some(0xd800..=0xdfff) => {
                json[at + 2..at + 6].copy_from_slice(b"fffd");
                at += 6;
            }
            // Another escape: skip the escaped byte, it may be a backslash itself.
            _ => at += 2,
        }
    }
}

/// The UTF-16 unit that the six bytes `\uHHHH` at `at` stand for.
fn unit_at(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at.checked_add(6)?)?.strip_prefix(b"\\u")?;
    digits.iter().try_fold(0, |unit, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(unit << 4 | u16::try_from(digit).ok()?)
    })
}

/// How many values a JSON text has at most, from its commas and brackets.
///
/// A value takes a few bytes of text and up to hundreds of memory, so their number has to be
/// bounded before they are made.
pub(in crate::lm) fn values_at_most(json: &[u8]) -> usize {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}

/// What Python says about a text that is no JSON, where that is plain from its first characters.
pub(super) fn python_error(json: &[u8]) -> Option<String> {
    let start = skip_space(json, 0);
    let rest = &json[start..];
    let literal = ["null", "true", "false"].iter().any(|word| rest.starts_with(word.as_bytes()));
    match rest.first() {
        Some(b'{') => {
            let at = skip_space(json, start + 1);
            let expects_name = !matches!(json.get(at), Some(b'"' | b'}'));
            let what = "Expecting property name enclosed in double quotes";
            expects_name.then(|| format!("{what}: {}", position(json, at)))
        }
        Some(b'[' | b'"' | b'-' | b'0'..=b'9') => None,
        _ if literal => None,
        _ => Some(format!("Expecting value: {}", position(json, start))),
    }
}

fn skip_space(json: &[u8], start: usize) -> usize {
    let space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    start + json[start..].iter().take_while(|byte| space(byte)).count()
}

/// Where Python sees an error; what is before it must be ASCII.
fn position(json: &[u8], at: usize) -> String {
    let before = &json[..at];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    format!("line {line} column {} (char {at})", at - line_start + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_python() {
        for (value, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (1.5e-6, "1.5e-06"),
            (0.0001, "0.0001"),
            (0.00012, "0.00012"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (0.1 + 0.2, "0.30000000000000004"),
            (123.25, "123.25"),
            (1e15, "1000000000000000.0"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            (1.2345678901234568e17, "1.2345678901234568e+17"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
        ] {
            assert_eq!(python_float(value), expected);
        }
        let values = serde_json::json!([1, -1, 2.0, null, true]);
        assert_eq!(encode(&values).unwrap(), b"[1, -1, 2.0, null, true]");
        assert_eq!(encode(&f64::NAN).unwrap(), b"null");
    }

    #[test]
    fn errors_are_those_of_python_where_they_are_plain() {
        let value = "Expecting value: line";
        let name = "Expecting property name enclosed in double quotes: line";
        for (json, expected) in [
            ("", Some(format!("{value} 1 column 1 (char 0)"))),
            ("  ", Some(format!("{value} 1 column 3 (char 2)"))),
            ("\n\n x", Some(format!("{value} 3 column 2 (char 3)"))),
            ("bad", Some(format!("{value} 1 column 1 (char 0)"))),
            ("nul", Some(format!("{value} 1 column 1 (char 0)"))),
            ("\u{e9}", Some(format!("{value} 1 column 1 (char 0)"))),
            ("{bad", Some(format!("{name} 1 column 2 (char 1)"))),
            ("{\n  1: 2}", Some(format!("{name} 2 column 3 (char 4)"))),
            ("{", Some(format!("{name} 1 column 2 (char 1)"))),
            ("{\"a\" 1}", None),
            ("[1", None),
            ("null x", None),
            ("-", None),
        ] {
            assert_eq!(python_error(json.as_bytes()), expected, "{json:?}");
        }
    }

    #[test]
    fn values_are_counted_outside_of_strings() {
        for (json, expected) in [
            ("", 1),
            ("7", 1),
            (r#""a,[{,""#, 1),
            (r#""\",[""#, 1),
            (r#""\\",["#, 3),
            (r#"{"a": [1, 2], "b": {}}"#, 6),
        ] {
            assert_eq!(values_at_most(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn only_lone_surrogates_are_replaced() {
        for (json, expected) in [
            (r"\ud83d\ude00", r"\ud83d\ude00"),
            (r"\uD83D\uDE00", r"\uD83D\uDE00"),
            (r"\ud800", r"\ufffd"),
            (r"\udc00 \ud800 ", r"\ufffd \ufffd "),
            (r"\ud800\ud83d\ude00", r"\ufffd\ud83d\ude00"),
            (r"\ude00\ud83d", r"\ufffd\ufffd"),
            (r"\\ud800", r"\\ud800"),
            (r"\\\ud800", r"\\\ufffd"),
            (r"\ud800\n", r"\ufffd\n"),
            (r"\ud800\u0041", r"\ufffd\u0041"),
            (r"\ud80", r"\ud80"),
            (r"\u+d80", r"\u+d80"),
            ("\\", "\\"),
        ] {
            let mut bytes = json.as_bytes().to_vec();
            replace_lone_surrogates(&mut bytes);
            assert_eq!(String::from_utf8(bytes).unwrap(), expected, "{json}");
        }
    }
}
