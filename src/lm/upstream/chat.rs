//! Chats as guests build them, and what of them is sent.

use serde_json::Value as Json;

/// Characters of a guest's own word that go into a message.
const QUOTED_CHARS_MAX: usize = 40;

/// The messages of a chat: an object or a list of them, each with a role.
///
/// Unless `remote_parts` are allowed there is nothing in them that makes a server fetch something: a
/// cell could send what it knows to any address by that, and reach those of the server's own network.
pub(super) fn messages(chat: &Json, remote_parts: bool) -> Result<&[Json], String> {
    let list = match chat {
        Json::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    if list.is_empty() {
        return Err("the prompt is an empty list; it must have at least one message".into());
    }
    for (i, message) in list.iter().enumerate() {
        let role = message.get("role").and_then(Json::as_str);
        if role.is_none() || message.get("content").is_none() {
            return Err(format!(
                "the prompt is neither a text nor a chat: item {} must be an object such as \
                 {{\"role\": \"user\", \"content\": \"…\"}}",
                i + 1
            ));
        }
        if !remote_parts {
            check(message).map_err(|reason| of_message(i, &reason))?;
        }
    }
    Ok(list)
}

/// What is wrong with a message, with its number.
pub(super) fn of_message(i: usize, reason: &str) -> String {
    format!("message {} of the prompt: {reason}", i + 1)
}

/// A guest's own word as a message shows it.
pub(super) fn quoted(word: &str) -> String {
    let mut chars = word.chars();
    let mut short: String = chars.by_ref().take(QUOTED_CHARS_MAX).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    format!("{short:?}")
}

fn check(message: &Json) -> Result<(), String> {
    for (key, value) in message.as_object().into_iter().flatten() {
        match key.as_str() {
            "content" => check_content(value)?,
            "role" | "name" | "tool_call_id" | "refusal" if value.is_string() => {}
            // Calls that a model made: names and arguments, which the server shows the model.
            "tool_calls" => {}
            _ if value.is_null() => {}
            key => {
                let key = quoted(key);
                return Err(format!(
                    "its {key} is not sent on; leave it out, or allow it with remote_parts"
                ));
            }
        }
    }
    Ok(())
}

fn check_content(content: &Json) -> Result<(), String> {
    let parts = match content {
        Json::Null | Json::String(_) => return Ok(()),
        Json::Array(parts) => parts,
        _ => return Err("its content is neither a text nor a list".into()),
    };
    let Some(i) = parts.iter().position(|part| !is_inline(part)) else { return Ok(()) };
    let kind =
        parts[i]["type"].as_str().map_or("no type".into(), |kind| format!("type {}", quoted(kind)));
    Err(format!(
        "its part {} ({kind}) may make the server fetch something; give texts as \
         {{\"type\": \"text\", \"text\": …}} and images inline, with a data: URL or in base64, or \
         allow others with remote_parts",
        i + 1
    ))
}

/// Whether a part is a text, or an image that is all there. A key that isn't known here may name one
/// that isn't.
fn is_inline(part: &Json) -> bool {
    match part["type"].as_str() {
        Some("text") => {
            has_only(part, &["type", "text", "cache_control"]) && part["text"].is_string()
        }
        Some("image_url") => {
            let image = &part["image_url"];
            let (url, is_known) = match image {
                Json::Object(_) => (&image["url"], has_only(image, &["url", "detail"])),
                url => (url, true),
            };
            let is_data = url.as_str().is_some_and(|url| url.starts_with("data:"));
            is_data && is_known && has_only(part, &["type", "image_url", "cache_control"])
        }
        Some("image") => {
            let source = &part["source"];
            source["type"] == "base64"
                && has_only(source, &["type", "media_type", "data"])
                && has_only(part, &["type", "source", "cache_control"])
        }
        _ => false,
    }
}

fn has_only(object: &Json, known: &[&str]) -> bool {
    object.as_object().is_some_and(|object| object.keys().all(|key| known.contains(&key.as_str())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_all_there_is_sent() {
        let data = "data:image/png;base64,AAAA";
        for part in [
            json!({"type": "text", "text": "see https://a.example/"}),
            json!({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}),
            json!({"type": "image_url", "image_url": {"url": data, "detail": "low"}}),
            json!({"type": "image_url", "image_url": data}),
            json!({"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "AAAA"
            }}),
        ] {
            let chat = json!([{"role": "user", "content": [part]}]);
            assert_eq!(messages(&chat, false).map(<[Json]>::len), Ok(1), "{part}");
        }
        let far = "https://a.example/?what-a-cell-knows";
        for part in [
            json!({"type": "image_url", "image_url": {"url": far}}),
            json!({"type": "image_url", "image_url": far}),
            json!({"type": "image_url", "image_url": {"url": " data:,"}}),
            json!({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
            json!({"type": "image_url", "image_url": {"url": data, "uri": far}}),
            json!({"type": "image_url", "image_url": {"url": data}, "url": far}),
            json!({"type": "image_url", "image_url": [data]}),
            json!({"type": "image_url"}),
            json!({"type": "image", "source": {"type": "url", "url": far}}),
            json!({"type": "image", "source": {"type": "base64", "data": "AAAA", "url": far}}),
            json!({"type": "image", "image": far, "source": {"type": "base64", "data": ""}}),
            json!({"type": "document", "source": {"type": "base64", "data": "AAAA"}}),
            json!({"type": "input_audio", "input_audio": {"data": "AAAA"}}),
            json!({"type": "file", "file": {"file_id": "f"}}),
            json!({"type": "tool_result", "content": [{"type": "image"}]}),
            json!({"type": "text", "text": {"image_url": far}}),
            json!({"type": "text", "text": "a", "image_url": far}),
            json!({"image_url": far}),
            json!({"text": "a"}),
            json!({}),
            json!("a"),
            json!(null),
            json!([]),
        ] {
            let text = json!({"type": "text", "text": "a"});
            let chat = json!([{"role": "user", "content": [text, part]}]);
            let error = messages(&chat, false).unwrap_err();
            assert!(error.starts_with("message 1 of the prompt: its part 2 ("), "{part}: {error}");
            assert!(messages(&chat, true).is_ok(), "{part}");
        }
    }

    #[test]
    fn keys_of_a_message_are_known_ones() {
        for (more, refused) in [
            (json!({"name": "a", "tool_calls": [{"id": "1"}], "refusal": null}), None),
            (json!({"tool_call_id": "1", "audio": null}), None),
            (json!({"images": ["https://a.example/"]}), Some("\"images\"")),
            (json!({"name": {"image_url": "https://a.example/"}}), Some("\"name\"")),
            (json!({"k".repeat(100): 1}), Some(format!("\"{}…\"", "k".repeat(40)).as_str())),
        ] {
            let mut message = json!({"role": "user", "content": "a"});
            message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let error = messages(&message, false).err();
            let expected = refused.map(|key| {
                format!(
                    "message 1 of the prompt: its {key} is not sent on; leave it out, or allow it \
                     with remote_parts"
                )
            });
            assert_eq!(error, expected, "{more}");
            assert!(messages(&message, true).is_ok());
        }
    }
}
