//! What the model's response says: code to run, and answers in the text.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::{Captures, Regex};

/// RLM's fence: every block marked `repl` is run, and nothing else.
static REPL_FENCE: LazyLock<Regex> = LazyLock::new(|| regex(r"(?s)```repl\s*\n(.*?)\n```"));
static ANY_FENCE: LazyLock<Regex> = LazyLock::new(|| regex(r"(?s)```.*?(?:```|\z)"));
static FINAL_VAR: LazyLock<Regex> = LazyLock::new(|| regex(r"(?ms)^\s*FINAL_VAR\((.*?)\)"));
/// Greedy, so that an answer may have parentheses in it.
static FINAL: LazyLock<Regex> = LazyLock::new(|| regex(r"(?ms)^\s*FINAL\((.*)\)\s*$"));

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is constant")
}

/// The code blocks of a response, in order.
pub(super) fn code_blocks(response: &str) -> Vec<&str> {
    REPL_FENCE
        .captures_iter(response)
        .map(|block| block.get(1).map_or("", |code| code.as_str().trim()))
        .collect()
}

/// An answer that stands in the text, as RLM ended runs up to version 0.1.1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Final {
    /// The answer itself.
    Text(String),
    /// The variable that holds it.
    Variable(String),
}

/// The answer in a response, if it has one; `anywhere` also within fences.
pub(super) fn final_in(response: &str, anywhere: bool) -> Option<Final> {
    // What is looked at is as long as the response, so that an answer may have fences in it.
    let looked_at = if anywhere { response.into() } else { masked(response) };
    if let Some(found) = FINAL_VAR.captures(&looked_at) {
        let name = found[1].trim().trim_matches('"').trim_matches('\'');
        return Some(Final::Variable(name.to_owned()));
    }
    let found = FINAL.captures(&looked_at)?.get(1)?;
    Some(Final::Text(response[found.range()].trim().to_owned()))
}

/// A response with blanks for its fences, line by line: what is in them is code, or an example.
fn masked(response: &str) -> Cow<'_, str> {
    ANY_FENCE.replace_all(response, |fence: &Captures<'_>| {
        let blank = |byte| if byte == b'\n' { '\n' } else { ' ' };
        fence[0].bytes().map(blank).collect::<String>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repl_fences_are_code_and_others_are_not() {
        let cases: &[(&str, &[&str])] = &[
            ("```repl\nx = 1\n```", &["x = 1"]),
            ("a\n```repl  \n\n  x = 1\ny\n\n```\nb\n```repl\nz\n```", &["x = 1\ny", "z"]),
            ("```python\nx\n```", &[]),
            ("```\nx\n```", &[]),
            // The text between one fence's end and the next's begin is none.
            ("```repl\na\n```\n```python\nb\n```\n```repl\nc\n```", &["a", "c"]),
            // An empty block is still one, as long as its fence closes on a line of its own.
            ("```repl\n\n```", &[""]),
            ("```repl\nx```", &[]),
            ("```repl\nunclosed", &[]),
            ("```replx = 1\n```", &[]),
            ("```repl\r\nx = 1\r\n```", &["x = 1"]),
            ("", &[]),
        ];
        for (response, blocks) in cases {
            assert_eq!(code_blocks(response), *blocks, "{response:?}");
        }
    }

    #[test]
    fn answers_stand_at_the_begin_of_a_line() {
        let text = |text: &str| Some(Final::Text(text.into()));
        let variable = |name: &str| Some(Final::Variable(name.into()));
        for (response, answer) in [
            ("FINAL(42)", text("42")),
            ("So:\n  FINAL( f(x) = (1) )\n", text("f(x) = (1)")),
            ("FINAL(a\nb)", text("a\nb")),
            ("FINAL_VAR(result)", variable("result")),
            ("x\nFINAL_VAR( \"result\" ) then FINAL(1)", variable("result")),
            ("FINAL_VAR('a')\nFINAL(b)", variable("a")),
            ("I will write FINAL(42) later", None),
            ("FINALLY(42)", None),
            ("FINAL(42", None),
        ] {
            assert_eq!(final_in(response, true), answer, "{response:?}");
        }
    }

    #[test]
    fn answers_in_fences_are_examples_and_fences_in_answers_are_parts_of_them() {
        let text = |text: &str| Some(Final::Text(text.into()));
        for (response, answer, anywhere) in [
            ("a\n```repl\nFINAL(1)\n```\nb", None, text("1")),
            ("a\n```\nFINAL(1)", None, text("1")),
            ("```\nFINAL(1)\n```\nFINAL(2)", text("2"), text("1)\n```\nFINAL(2")),
            (
                "FINAL(The code:\n```python\nprint(\u{e9})\n```\nworks)",
                text("The code:\n```python\nprint(\u{e9})\n```\nworks"),
                text("The code:\n```python\nprint(\u{e9})\n```\nworks"),
            ),
        ] {
            assert_eq!(final_in(response, false), answer, "{response:?}");
            assert_eq!(final_in(response, true), anywhere, "{response:?}");
        }
    }
}
