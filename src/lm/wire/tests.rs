//! What comes and goes over the wire, value by value.

use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::sample;

use super::*;

#[test]
fn requests_are_encoded_as_python_does() {
    let chat = serde_json::json!([{"content": "\u{7f}\u{0}\n\"\\/", "role": "user"}]);
    for (prompt, expected) in [
        (PromptJson::Text("h\u{e9}"), r#""h\u00e9""#),
        (PromptJson::Text("\u{1f600}~"), r#""\ud83d\ude00~""#),
        (PromptJson::Text("\t\u{8}\u{c}\r\u{1b}"), r#""\t\b\f\r\u001b""#),
        (PromptJson::Messages(&chat), r#"[{"content": "\u007f\u0000\n\"\\/", "role": "user"}]"#),
    ] {
        let request = RequestJson {
            prompt: Some(prompt),
            prompts: None,
            model: None,
            depth: -1,
            token: None,
        };
        let bytes = request.encode().unwrap();
        let expected = format!(r#"{{"prompt": {expected}, "depth": -1}}"#);
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }
}

fn asked(payload: &str) -> Result<Asked, String> {
    Asked::read(read_object(payload.into())?, 2)
}

#[test]
fn requests_are_read_as_python_does() {
    let one = |text: &str| AskedPrompts::One(Prompt::Text(text.into()));
    let batch = |texts: &[&str]| {
        AskedPrompts::Batch(texts.iter().map(|text| Prompt::Text((*text).into())).collect())
    };
    let chat = AskedPrompts::One(Prompt::Messages(serde_json::json!({"role": "user"})));
    for (payload, prompts, model, depth) in [
        (r#"{"prompt": "a"}"#, one("a"), None, -1),
        (r#"{"prompt": "a", "depth": null, "model": null}"#, one("a"), None, -1),
        (r#"{"prompt": "a", "depth": 3, "model": "m", "new": [1]}"#, one("a"), Some("m"), 3),
        (r#"{"prompt": "a", "model": ""}"#, one("a"), None, -1),
        (&long_name(1024), one("a"), Some(&*"m".repeat(1024)), -1),
        (r#"{"prompt": "a", "prompt": "b"}"#, one("b"), None, -1),
        (r#"{"prompt": {"role": "user"}}"#, chat, None, -1),
        (r#"{"prompt": "a", "prompts": ["b", ""]}"#, batch(&["b", ""]), None, -1),
        (r#"{"prompt": "a", "prompts": []}"#, one("a"), None, -1),
        (r#"{"prompt": "\ud83d", "prompts": null}"#, one("\u{fffd}"), None, -1),
    ] {
        let expected = Asked { prompts, model: model.map(str::to_owned), depth };
        assert_eq!(asked(payload), Ok(expected), "{payload}");
    }
}

#[test]
fn what_is_no_request_is_named() {
    for (payload, expected) in [
        ("{}", NO_PROMPT),
        (r#"{"prompt": {}, "prompts": []}"#, NO_PROMPT),
        (r#"{"prompt": 0}"#, NO_PROMPT),
        ("[1]", "Request must be a JSON object"),
        ("\"prompt\"", "Request must be a JSON object"),
        ("null", "Request must be a JSON object"),
        ("", "Expecting value: line 1 column 1 (char 0)"),
        (
            r#"{"prompt": 5}"#,
            "'prompt' must be a string, a message or a list of messages, not a number",
        ),
        (
            r#"{"prompts": ["a", null]}"#,
            "'prompts'[1] must be a string, a message or a list of messages, not null",
        ),
        (r#"{"prompts": "ab"}"#, "'prompts' must be a list of prompts, not a string"),
        (r#"{"prompts": ["", "", ""]}"#, "3 prompts in one request; at most 2 fit"),
        (r#"{"prompt": "a", "model": 1}"#, "'model' must be a string, not a number"),
        (&long_name(1025), "'model' has 1025 bytes; it can have 1024"),
        (r#"{"prompt": "a", "depth": 1.5}"#, "'depth' must be a whole number of 32 bits"),
        (r#"{"prompt": "a", "depth": 1e99}"#, "'depth' must be a whole number of 32 bits"),
        (r#"{"prompt": "a", "depth": 2147483648}"#, "'depth' must be a whole number of 32 bits"),
    ] {
        assert_eq!(asked(payload).unwrap_err(), expected, "{payload}");
    }
    for payload in ["{\"prompt\": \"a\"", "{} {}", "{\"a\": 1e999}", "{\"a\":\"\\x\"}"] {
        let error = asked(payload).unwrap_err();
        assert!(error.starts_with("Invalid JSON: "), "{payload}: {error}");
    }
    let deep = asked(&"[".repeat(REQUEST_VALUES_MAX - 1)).unwrap_err();
    assert!(deep.starts_with("Invalid JSON: recursion limit"), "{deep}");
    let many = format!("[{}1]", "1,".repeat(REQUEST_VALUES_MAX));
    let error = asked(&many).unwrap_err();
    assert_eq!(error, "the request has more than 262144 JSON values");
}

fn long_name(bytes: usize) -> String {
    format!(r#"{{"prompt": "a", "model": "{}"}}"#, "m".repeat(bytes))
}

fn completions(reply: &str) -> Result<Vec<Result<LmCompletion, LmError>>, String> {
    let reply = ReplyJson::read(reply.into(), 0)?;
    let completions = reply.chat_completions.unwrap_or_default();
    Ok(completions.into_iter().map(CompletionJson::into_result).collect())
}

#[test]
fn what_is_null_in_a_reply_costs_no_other_answer() {
    let reply = r#"{"chat_completions": [{"root_model": "m", "response": "a"}, null,
        {"root_model": null, "response": null, "usage_summary": null, "execution_time": null,
         "metadata": null, "error": null}]}"#;
    let found = completions(reply).unwrap();
    let answer = |model: &str, response: &str| {
        let (model, response) = (model.into(), response.into());
        Ok(LmCompletion { model, response, ..LmCompletion::default() })
    };
    assert_eq!(found, [answer("m", "a"), Err(LmError::new(NO_COMPLETION)), answer("", "")]);
    let error = completions(r#"{"chat_completions": [{"root_model": "m"}]}"#).unwrap_err();
    assert!(error.starts_with("missing field `response`"), "{error}");
}

#[test]
fn costs_of_a_reply_are_amounts() {
    for (sent, expected) in
        [("0", Some(0.0)), ("0.5", Some(0.5)), ("-0.5", None), ("-1e300", None), ("null", None)]
    {
        let reply = format!(
            r#"{{"chat_completions": [{{"response": "", "usage_summary":
            {{"model_usage_summaries": {{"m": {{"total_cost": {sent}}}}}}}}}]}}"#
        );
        let answers = completions(&reply).unwrap();
        assert_eq!(answers[0].as_ref().unwrap().usage[0].cost, expected, "{sent}");
    }
}

#[test]
fn a_reply_has_a_number_of_values() {
    let metadata = |objects: usize| {
        let metadata = vec![r#"{"":0}"#; objects].join(",");
        let reply = r#"{"chat_completion": {"response": "", "metadata": [METADATA]}}"#;
        reply.replace("METADATA", &metadata).into_bytes()
    };
    // Each object counts twice, with its comma; all else is four.
    let fits = REPLY_VALUES_MAX / 2 - 2;
    assert!(ReplyJson::read(metadata(fits), 0).is_ok());
    let error = ReplyJson::read(metadata(fits + 1), 0).err();
    assert_eq!(error.as_deref(), Some("it has more than 524288 JSON values"));
    assert!(ReplyJson::read(metadata(fits + 1), 2).is_ok());
}

proptest::proptest! {
    #[test]
    fn whatever_comes_is_a_request_or_an_error(pieces in pieces()) {
        let _ = read_object(pieces.concat()).and_then(|request| Asked::read(request, 2));
    }
}

/// Texts that are almost requests.
fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let words = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        " ",
        "\n",
        "\"prompt\":",
        "\"prompts\":",
        "\"depth\":",
        "1",
        "-1e9",
        "null",
        "\"a\"",
        "\\ud83d",
        "\\u",
        "{\"",
        "\u{e9}",
    ];
    let words: Vec<Vec<u8>> = words.map(Vec::from).into();
    let piece = prop_oneof![sample::select(words), vec(any::<u8>(), 1)];
    vec(piece, 0..30)
}

#[test]
fn usage_has_rlms_fields_in_their_order() {
    let usage = |model: &str, cost| ModelUsage {
        model: model.into(),
        calls: 1,
        input_tokens: 2,
        output_tokens: 3,
        cost,
    };
    let completion = LmCompletion {
        model: "m".into(),
        usage: vec![usage("m", Some(0.5)), usage("c", None), usage("m", Some(0.25))],
        metadata: Some(serde_json::json!({"iterations": [1.0]})),
        ..LmCompletion::default()
    };
    let prompt = Prompt::Text("p".into());
    let answer = AnswerJson::new(None, &prompt, &completion, Duration::ZERO);
    assert_eq!(
        String::from_utf8(json::encode(&answer).unwrap()).unwrap(),
        concat!(
            r#"{"root_model": "m", "prompt": "p", "response": "", "#,
            r#""usage_summary": {"model_usage_summaries": {"c": {"total_calls": 1, "#,
            r#""total_input_tokens": 2, "total_output_tokens": 3}, "m": {"total_calls": 2, "#,
            r#""total_input_tokens": 4, "total_output_tokens": 6, "total_cost": 0.75}}, "#,
            r#""total_cost": 0.75}, "execution_time": 0.0, "#,
            r#""metadata": {"iterations": [1.0]}}"#,
        )
    );
}
