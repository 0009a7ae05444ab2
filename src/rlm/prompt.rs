//! The messages that the loop writes: the system prompt, what the context is, and the turns.

use serde_json::{Value as Json, json};

use super::Dialect;
use super::tools::RlmTool;
use crate::environment::Context;

const SYSTEM: &str = include_str!("prompts/system.md");
const ORCHESTRATOR: &str = include_str!("prompts/orchestrator.md");
const ENDING_ANSWER: &str = include_str!("prompts/ending_answer.md");
const ENDING_FINAL: &str = include_str!("prompts/ending_final.md");
/// Where a system prompt of the user's own has the list of tools.
pub(super) const TOOLS_SLOT: &str = "{tools}";
/// A larger JSON context isn't taken apart to be measured.
const PARSED_BYTES_MAX: usize = 4 << 20;
const ENDING_SLOT: &str = "{ending}";

/// What the last call is asked, when the turns have run out.
pub(super) const LAST_CHANCE: &str =
    "Please provide a final answer to the user's question based on the information provided.";

/// What a summary of the conversation is asked for with.
pub(super) const SUMMARIZE: &str = "\
Your conversation is getting too long and is going to be replaced by a summary. Write it now, in one to \
three paragraphs:
1. What you have done so far, and what is still to be done.
2. Every result that you have, exactly: numbers, values, names of variables and what they hold.
3. What you do next.";

/// What follows a summary.
pub(super) fn go_on(compactions: u32) -> String {
    format!(
        "Your conversation has been compacted {compactions} time(s): above is your own summary of it. \
         All variables of the session are still there (SHOW_VARS() lists them), and `history` holds \
         the whole conversation. Don't do again what is done. Go on with your next step."
    )
}

/// A message of a chat.
pub(super) fn message(role: &str, content: impl Into<String>) -> Json {
    json!({ "role": role, "content": content.into() })
}

/// The system prompt: the user's own or Kaa's.
pub(super) fn system(
    own: Option<&str>,
    tools: &[RlmTool],
    dialect: Dialect,
    orchestrator: bool,
    compaction: bool,
) -> String {
    let list: Vec<String> = tools.iter().map(RlmTool::line).collect();
    let list = match list.is_empty() {
        true => String::new(),
        false => format!("- Tools and data of the user:\n{}\n", list.join("\n")),
    };
    let ending = match dialect {
        Dialect::Final => ENDING_FINAL,
        Dialect::Answer | Dialect::Both => ENDING_ANSWER,
    };
    let mut text = match own {
        // A text of the user's own: only what stands for something in it is filled in.
        Some(own) => own.replace(TOOLS_SLOT, &list),
        None => SYSTEM.replace(TOOLS_SLOT, &list).replace(ENDING_SLOT, ending.trim_end()),
    };
    if own.is_none() && orchestrator {
        text = format!("{}\n\n{}", text.trim_end(), ORCHESTRATOR.trim_end());
    }
    if compaction {
        text.push_str(
            "\n\nThe whole conversation, with any summaries, is in the variable `history` of the \
             session, as a list.",
        );
    }
    text
}

/// What the model is told about the context before the first turn.
pub(super) fn metadata(context: &Context, question: Option<&str>) -> String {
    let (kind, chars) = measure(context);
    let body = format!(
        "Your context is a {kind} of {chars} total characters. Each sub-LLM call can handle roughly \
         ~100k tokens at once."
    );
    match question {
        Some(question) => format!("Answer the following: {question}\n\n{body}"),
        None => body,
    }
}

/// The type of a context in Python, and its size in characters as RLM counts it.
fn measure(context: &Context) -> (&'static str, usize) {
    let text = match context {
        Context::Text(text) => return ("str", chars(text)),
        Context::Bytes(bytes) => return ("bytes", bytes.len()),
        Context::Json(json) => json,
    };
    // What only Python reads (`NaN`, half surrogate pairs) and what is too large to be taken apart
    // here is measured as a whole. Whether it's JSON at all, the session says.
    let small = text.len() <= PARSED_BYTES_MAX;
    let Some(json) = small.then(|| serde_json::from_slice::<Json>(text).ok()).flatten() else {
        let kind = match text.trim_ascii_start().first() {
            Some(b'{') => "dict",
            Some(b'[') => "list",
            Some(b'"') => "str",
            _ => "value",
        };
        return (kind, chars(text));
    };
    let part = |value: &Json| match value {
        Json::String(text) => text.chars().count(),
        other => python_length(other),
    };
    match &json {
        Json::Object(fields) => ("dict", fields.values().map(part).sum()),
        Json::Array(items) => {
            // A list of messages is as long as what they say.
            let chat = items.first().is_some_and(|first| first.get("content").is_some());
            let content = |item: &Json| item.get("content").map_or(0, part);
            ("list", items.iter().map(|item| if chat { content(item) } else { part(item) }).sum())
        }
        Json::String(text) => ("str", text.chars().count()),
        Json::Number(number) if number.is_f64() => ("float", python_length(&json)),
        Json::Number(_) => ("int", python_length(&json)),
        Json::Bool(_) => ("bool", python_length(&json)),
        Json::Null => ("NoneType", python_length(&json)),
    }
}

/// Characters of a text, of which half a surrogate pair is one.
fn chars(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}

/// The length of what Python's `json.dumps` makes.
fn python_length(json: &Json) -> usize {
    match json {
        Json::Null => 4,
        Json::Bool(value) => value.to_string().len(),
        Json::Number(number) => number.to_string().len(),
        Json::String(text) => 2 + text.chars().map(escaped_length).sum::<usize>(),
        Json::Array(items) => {
            2 + items.iter().map(python_length).sum::<usize>() + 2 * items.len().saturating_sub(1)
        }
        Json::Object(fields) => {
            let text = |key: &str| 2 + key.chars().map(escaped_length).sum::<usize>();
            let parts = fields.iter().map(|(key, value)| text(key) + 2 + python_length(value));
            2 + parts.sum::<usize>() + 2 * fields.len().saturating_sub(1)
        }
    }
}

fn escaped_length(c: char) -> usize {
    match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        ' '..='~' => 1,
        _ => 6 * c.len_utf16(),
    }
}

/// The message that begins a turn, counted from 1.
pub(super) fn turn(number: u32, of: u32, contexts: u32, histories: u32) -> String {
    let mut text = format!("Turn {number}/{of}:");
    if number == 1 {
        text = format!(
            "You have not interacted with the REPL environment or seen your prompt / context yet. \
             Look at the context first; do not provide a final answer yet.\n\n{text}"
        );
    }
    if contexts > 1 {
        text.push_str(&format!(
            "\n\nNote: You have {contexts} contexts available (context_0 through context_{}).",
            contexts - 1
        ));
    }
    match histories {
        0 => {}
        1 => text.push_str(
            "\n\nNote: You have 1 prior conversation history available in the `history` variable.",
        ),
        _ => text.push_str(&format!(
            "\n\nNote: You have {histories} prior conversation histories available (history_0 \
             through history_{}).",
            histories - 1
        )),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    // As `QueryMetadata` of rlms 0.1.3 counts.
    #[test]
    fn contexts_are_measured_as_rlm_does() {
        let json = |text: &str| Context::Json(text.as_bytes().to_vec());
        for (context, kind, chars) in [
            (Context::Text("h\u{e9}llo".into()), "str", 5),
            (Context::Text(b"a\xed\xa0\xbdb".to_vec()), "str", 3),
            (Context::Bytes(vec![0xff; 4]), "bytes", 4),
            (json(r#"["ab", "cde"]"#), "list", 5),
            (json("[]"), "list", 0),
            (json(r#"[{"role": "user", "content": "hi"}, {"role": "x"}]"#), "list", 2),
            (json(r#"[{"a": [1, "\u00e9"]}]"#), "list", r#"{"a": [1, "\u00e9"]}"#.len()),
            (json(r#"{"a": "xyz", "b": [true, null]}"#), "dict", 3 + "[true, null]".len()),
            (json(r#""text""#), "str", 4),
            (json("12"), "int", 2),
            (json(r#"["\ud800"]"#), "list", 10),
            (json("[NaN, 1]"), "list", 8),
        ] {
            assert_eq!(measure(&context), (kind, chars), "{context:?}");
        }
    }

    #[test]
    fn fixed_texts_are_those_of_rlm() {
        let context = Context::Text(b"abc".to_vec());
        let body = "Your context is a str of 3 total characters. Each sub-LLM call can handle roughly \
                    ~100k tokens at once.";
        assert_eq!(metadata(&context, None), body);
        let asked = format!("Answer the following: why?\n\n{body}");
        assert_eq!(metadata(&context, Some("why?")), asked);
        let first = "You have not interacted with the REPL environment or seen your prompt / context \
                     yet. Look at the context first; do not provide a final answer yet.\n\nTurn 1/30:";
        assert_eq!(turn(1, 30, 1, 0), first);
        assert_eq!(
            turn(2, 5, 3, 1),
            "Turn 2/5:\n\nNote: You have 3 contexts available (context_0 through context_2).\n\n\
             Note: You have 1 prior conversation history available in the `history` variable."
        );
        assert!(turn(2, 5, 1, 2).ends_with(
            "Note: You have 2 prior conversation histories available (history_0 through history_1)."
        ));
    }

    #[test]
    fn the_system_prompt_has_no_slot_left() {
        for dialect in [Dialect::Answer, Dialect::Final, Dialect::Both] {
            let text = system(None, &[], dialect, true, true);
            assert!(!text.contains(TOOLS_SLOT) && !text.contains(ENDING_SLOT), "{text}");
            assert_eq!(text.contains("answer[\"ready\"]"), dialect != Dialect::Final);
            assert_eq!(text.contains("FINAL_VAR"), dialect == Dialect::Final);
        }
        let tool = RlmTool::value("limit", 5).described("the most that counts");
        let own = system(Some("Do it. {\"x\"}\n{tools}"), &[tool], Dialect::Both, true, false);
        let expected =
            "Do it. {\"x\"}\n- Tools and data of the user:\n- `limit`: the most that counts\n";
        assert_eq!(own, expected);
    }
}
