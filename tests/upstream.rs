//! Models behind HTTP, against a server that fails in every way.

#[path = "common/chat_server.rs"]
mod chat_server;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use chat_server::{ChatOptions, ChatRequest, ChatServer, Reply};
use futures_util::future::join_all;
use kaa::lm::{
    AnthropicHandler, HttpProxy, LmCompletion, LmHandler, LmKind, LmRequest, OpenAiHandler, Price,
    Prompt, Retries, Secret, UpstreamOptions,
};
use serde_json::{Value as Json, json};

const KEY: &str = "sk-this-must-not-be-seen";

/// Options that don't let a test wait.
fn options(base_url: impl Into<String>) -> UpstreamOptions {
    UpstreamOptions {
        base_url: Some(base_url.into()),
        timeout: Duration::from_secs(60),
        retries: Retries {
            base: Duration::from_millis(1),
            cap: Duration::from_millis(4),
            ..Retries::default()
        },
        ..UpstreamOptions::default()
    }
}

fn openai(options: UpstreamOptions) -> OpenAiHandler {
    OpenAiHandler::new("m", options).unwrap()
}

fn anthropic(options: UpstreamOptions) -> AnthropicHandler {
    AnthropicHandler::new("m", options).unwrap()
}

/// A server that does the same whatever it's asked.
fn always(reply: Reply) -> ChatServer {
    ChatServer::start(ChatOptions::default(), move |_| reply.clone())
}

/// One that keeps what it's asked.
fn recording() -> ChatServer {
    let options = ChatOptions { record: true, ..ChatOptions::default() };
    ChatServer::start(options, |_| "an answer of five words")
}

fn request(prompt: Prompt) -> LmRequest {
    LmRequest { kind: LmKind::Llm, prompt, model: None, depth: 1 }
}

async fn ask(handler: &dyn LmHandler, text: &str) -> Result<LmCompletion, String> {
    let request = request(Prompt::Text(text.into()));
    handler.complete(&request).await.map_err(|error| error.message)
}

async fn say(handler: &dyn LmHandler, text: &str) -> Result<String, String> {
    ask(handler, text).await.map(|completion| completion.response)
}

fn header<'a>(request: &'a ChatRequest, name: &str) -> Option<&'a str> {
    request.headers.get(name).map(|value| value.to_str().unwrap())
}

#[tokio::test]
async fn openai_is_asked_in_its_words() {
    let server = recording();
    let handler = openai(UpstreamOptions {
        key: Some(Secret::new(KEY)),
        price: Some(Price { input: 1_000_000.0, output: 2_000_000.0 }),
        output_tokens_max: Some(99),
        parameters: json!({"temperature": 0.5}).as_object().unwrap().clone(),
        headers: vec![("x-team".into(), Secret::new("blue"))],
        ..options(server.openai_url())
    });
    let prompt = Prompt::Text("three words here".into());
    let named = LmRequest { model: Some("nick".into()), ..request(prompt) };
    let completion = handler.complete(&named).await.unwrap();
    assert_eq!(completion.response, "an answer of five words");
    assert_eq!(completion.model, "nick");
    let usage = &completion.usage[0];
    assert_eq!((usage.model.as_str(), usage.calls), ("m", 1));
    assert_eq!((usage.input_tokens, usage.output_tokens), (3, 5));
    assert_eq!(usage.cost, Some(13.0));
    assert!(completion.execution_time > Duration::ZERO);

    let [asked] = server.requests().try_into().unwrap();
    assert_eq!(asked.path, "/v1/chat/completions");
    assert_eq!(header(&asked, "authorization"), Some(format!("Bearer {KEY}").as_str()));
    assert_eq!(header(&asked, "x-team"), Some("blue"));
    assert_eq!(header(&asked, "content-type"), Some("application/json"));
    assert!(header(&asked, "user-agent").unwrap().starts_with("kaa/"));
    assert_eq!(
        asked.body,
        json!({
            "model": "m", "messages": [{"role": "user", "content": "three words here"}],
            "max_tokens": 99, "temperature": 0.5,
        })
    );
}

#[tokio::test]
async fn anthropic_is_asked_in_its_words() {
    let server = recording();
    let handler = anthropic(UpstreamOptions {
        key: Some(Secret::new(KEY)),
        parameters: json!({"temperature": 0.5}).as_object().unwrap().clone(),
        // A slash at the end is as good as none.
        ..options(server.anthropic_url() + "/")
    });
    let completion = ask(&handler, "three words here").await.unwrap();
    assert_eq!(
        (completion.response.as_str(), completion.model.as_str()),
        ("an answer of five words", "m")
    );
    let usage = &completion.usage[0];
    assert_eq!((usage.input_tokens, usage.output_tokens, usage.cost), (3, 5, None));

    let [asked] = server.requests().try_into().unwrap();
    assert_eq!(asked.path, "/v1/messages");
    assert_eq!(header(&asked, "x-api-key"), Some(KEY));
    assert_eq!(header(&asked, "anthropic-version"), Some("2023-06-01"));
    assert_eq!(header(&asked, "authorization"), None);
    assert_eq!(
        asked.body,
        json!({
            "model": "m", "max_tokens": 8192, "temperature": 0.5,
            "messages": [{
                "role": "user", "content": [{"type": "text", "text": "three words here"}]
            }],
        })
    );
}

#[tokio::test]
async fn chats_take_the_form_of_their_provider() {
    let server = recording();
    let handlers: [&dyn LmHandler; 2] =
        [&openai(options(server.openai_url())), &anthropic(options(server.anthropic_url()))];
    let user = |text: &str| json!({"role": "user", "content": text});
    let said = |role: &str, texts: &[&str]| {
        let parts = texts.iter().map(|text| json!({"type": "text", "text": text}));
        json!({"role": role, "content": parts.collect::<Json>()})
    };
    let system = json!({"role": "system", "content": "be brief"});
    let source = json!({"type": "base64", "media_type": "image/png", "data": "AAAA"});
    let image = json!({"role": "user", "content": [{"type": "image", "source": source}]});
    let far = json!({"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://a.example/?secret"}}
    ]});
    let not_far = "m: message 1 of the prompt: its part 1 (type \"image_url\") may make the server \
                   fetch something; give texts as";
    let no_chat = |item: u32| {
        format!("m: the prompt is neither a text nor a chat: item {item} must be an object such as")
    };
    let messages = |list: Json| Ok(json!({"messages": list}));
    type Sent = Result<Json, String>;
    // What OpenAI's interface gets as messages, and Anthropic's as messages and system.
    let cases: Vec<(Json, Sent, Sent)> = vec![
        (user("a"), messages(json!([user("a")])), messages(json!([said("user", &["a"])]))),
        (
            json!([system, user("a"), user("b"), said("assistant", &["c"])]),
            messages(json!([system, user("a"), user("b"), said("assistant", &["c"])])),
            Ok(json!({
                "system": "be brief",
                "messages": [said("user", &["a", "b"]), said("assistant", &["c"])],
            })),
        ),
        (
            json!([system, user("a"), {"role": "developer", "content": "and kind"}]),
            messages(json!([system, user("a"), {"role": "developer", "content": "and kind"}])),
            Ok(json!({"system": "be brief\n\nand kind", "messages": [said("user", &["a"])]})),
        ),
        (json!([image]), messages(json!([image])), messages(json!([image]))),
        (json!([far]), Err(not_far.into()), Err(not_far.into())),
        (
            json!([system]),
            messages(json!([system])),
            Err("m: the prompt has no message of a user".into()),
        ),
        (
            json!([{"role": "tool", "content": "x"}]),
            messages(json!([{"role": "tool", "content": "x"}])),
            Err("m: message 1 of the prompt: role \"tool\" is not known here".into()),
        ),
        (
            json!([user("a"), {"role": "user", "content": 5}]),
            Err("m: message 2 of the prompt: its content is neither a text nor a list".into()),
            Err("m: message 2 of the prompt: its content is neither a text nor a list".into()),
        ),
        (json!(["a"]), Err(no_chat(1)), Err(no_chat(1))),
        (json!([user("a"), {"content": "b"}]), Err(no_chat(2)), Err(no_chat(2))),
        (json!({"question": "a"}), Err(no_chat(1)), Err(no_chat(1))),
        (json!(5), Err(no_chat(1)), Err(no_chat(1))),
        (
            json!([]),
            Err("m: the prompt is an empty list".into()),
            Err("m: the prompt is an empty list".into()),
        ),
    ];
    for (prompt, for_openai, for_anthropic) in cases {
        for (handler, expected) in handlers.iter().zip([for_openai, for_anthropic]) {
            let before = server.counts().requests;
            let result = handler.complete(&request(Prompt::Messages(prompt.clone()))).await;
            match (result, expected) {
                (Ok(_), Ok(mut expected)) => {
                    let asked = server.requests().pop().unwrap().body;
                    expected["model"] = json!("m");
                    if let Some(most) = asked.get("max_tokens") {
                        expected["max_tokens"] = most.clone();
                    }
                    assert_eq!(asked, expected, "{prompt}");
                }
                (Err(error), Err(expected)) => {
                    assert!(error.message.starts_with(&expected), "{prompt}: {error}");
                    assert_eq!(server.counts().requests, before);
                }
                (result, expected) => panic!("{prompt}: {result:?}, not {expected:?}"),
            }
        }
    }
}

#[tokio::test]
async fn what_a_server_fetches_is_sent_where_that_is_allowed() {
    let server = recording();
    let image = json!({"type": "image_url", "image_url": {"url": "https://a.example/"}});
    let message = json!({"role": "user", "content": [image], "audio": {"id": "1"}});
    let allowed = |base_url| UpstreamOptions { remote_parts: true, ..options(base_url) };
    let handlers: [&dyn LmHandler; 2] =
        [&openai(allowed(server.openai_url())), &anthropic(allowed(server.anthropic_url()))];
    for handler in handlers {
        handler.complete(&request(Prompt::Messages(message.clone()))).await.unwrap();
    }
    let sent: Vec<_> =
        server.requests().into_iter().map(|asked| asked.body["messages"].clone()).collect();
    assert_eq!(sent, [json!([message]), json!([{"role": "user", "content": [image]}])]);
}

#[tokio::test]
async fn answers_are_read_in_all_their_forms() {
    let choice = |message: Json| json!({"choices": [{"message": message}]}).to_string();
    let text = |content: Json| choice(json!({"content": content}));
    let block = |content: Json| json!({"content": content}).to_string();
    // Whether it's OpenAI's, the body, and what becomes of it.
    let huge_text = json!({"choices": "x".repeat(1_000_000)}).to_string();
    let cases: Vec<(bool, String, Result<&str, &str>)> = vec![
        (
            true,
            huge_text,
            Err("m: the answer has not the form of a completion: invalid type: string"),
        ),
        (true, text(json!("a")), Ok("a")),
        (true, text(json!("")), Ok("")),
        (true, text(json!([{"type": "text", "text": "a"}, {"text": "b"}])), Ok("ab")),
        (true, text(json!([{"type": "reasoning", "text": "a"}])), Err("m: the answer has no text")),
        (true, text(json!(null)), Err("m: the answer has no text")),
        (
            true,
            choice(json!({"content": null, "refusal": "I\nwon't"})),
            Err("m: the model refused: I won't"),
        ),
        (true, choice(json!({})), Err("m: the answer has no text")),
        (
            true,
            json!({"choices": [{"finish_reason": "length", "message": {}}]}).to_string(),
            Err("m: the answer has no text (finish_reason length)"),
        ),
        (true, json!({"choices": [{}]}).to_string(), Err("m: the answer's choice has no message")),
        (true, json!({"choices": []}).to_string(), Err("m: the answer has no choices")),
        (true, "{}".into(), Err("m: the answer has no choices")),
        (
            true,
            json!({"error": {"message": "no such model"}}).to_string(),
            Err("m: the server says: no such model"),
        ),
        (
            true,
            json!({"error": "no such model"}).to_string(),
            Err("m: the server says: no such model"),
        ),
        (
            true,
            text(json!(5)),
            Err(
                "m: the answer has not the form of a completion: invalid type: integer `5`, expected a text or a list of parts",
            ),
        ),
        (true, "[]".into(), Err("m: the answer has not the form of a completion")),
        (true, "5".into(), Err("m: the answer has not the form of a completion")),
        (
            true,
            "<html>".into(),
            Err("m: the answer is not JSON: expected value at line 1 column 1"),
        ),
        (true, String::new(), Err("m: the answer is not JSON")),
        (
            true,
            "{\"choices\": [{\"message\": {\"content\": \"a \\ud83d b\"}}]}".into(),
            Ok("a \u{fffd} b"),
        ),
        (true, "[".repeat(100_000), Err("m: the answer has not the form of a completion")),
        (true, "{\"a\": ".to_owned() + &"[".repeat(100_000), Err("m: the answer is not JSON: EOF")),
        (
            false,
            block(json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
            Ok("ab"),
        ),
        (
            false,
            block(json!([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}])),
            Ok("a"),
        ),
        (false, block(json!([])), Ok("")),
        (
            false,
            json!({"content": [], "stop_reason": "refusal"}).to_string(),
            Err("m: the model refused to answer"),
        ),
        (false, "{}".into(), Err("m: the answer has no content")),
        (
            false,
            json!({"type": "error", "error": {"message": "busy"}}).to_string(),
            Err("m: the server says: busy"),
        ),
    ];
    for (is_openai, body, expected) in cases {
        let server = always(Reply::Raw(200, Vec::new(), body.clone()));
        let result = match is_openai {
            true => say(&openai(options(server.openai_url())), "x").await,
            false => say(&anthropic(options(server.anthropic_url())), "x").await,
        };
        let body = &body[..body.len().min(100)];
        match (&result, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{body}"),
            (Err(found), Err(expected)) => {
                assert!(found.starts_with(expected), "{body}: {found}");
                assert!(found.chars().count() < 600, "{body}");
            }
            _ => panic!("{body}: {result:?}, not {expected:?}"),
        }
        assert_eq!(server.counts().requests, 1, "{body}");
    }
}

#[tokio::test]
async fn usage_is_the_servers_or_estimated() {
    let answer = |usage: Json| {
        let message = json!({"role": "assistant", "content": "five."});
        json!({"choices": [{"message": message}], "content": "five.", "usage": usage}).to_string()
    };
    let openai_usage = json!({"prompt_tokens": 7, "completion_tokens": 8.0, "cost": 0.25});
    let anthropic_usage = json!({
        "input_tokens": 1, "cache_creation_input_tokens": 10, "cache_read_input_tokens": 100,
        "output_tokens": 8
    });
    // The prompt has 9 characters, the answer 5.
    for (is_openai, usage, input, output, cost) in [
        (true, openai_usage, 7, 8, Some(0.25)),
        (true, json!({}), 3, 2, None),
        (true, json!(null), 3, 2, None),
        (true, json!({"prompt_tokens": null, "completion_tokens": -5, "cost": -1}), 3, 0, None),
        (true, json!({"prompt_tokens": 1e300}), u64::MAX, 2, None),
        (false, anthropic_usage, 111, 8, None),
        (false, json!({"cache_read_input_tokens": 100}), 3, 2, None),
        // What isn't a number is none.
        (
            true,
            json!({"prompt_tokens": "7", "completion_tokens": 8, "cost": {"a": [1]}}),
            3,
            8,
            None,
        ),
        (true, json!({"prompt_tokens": [7], "completion_tokens": true, "cost": "1"}), 3, 2, None),
        (true, json!("much"), 3, 2, None),
        (true, json!([7, 8, 0.25]), 3, 2, None),
        (true, json!(7), 3, 2, None),
        (false, json!({"input_tokens": 1, "cache_read_input_tokens": {}}), 1, 2, None),
        (false, json!(false), 3, 2, None),
    ] {
        let server = always(Reply::Raw(200, Vec::new(), answer(usage.clone())));
        let completion = match is_openai {
            true => ask(&openai(options(server.openai_url())), "nine char").await,
            false => ask(&anthropic(options(server.anthropic_url())), "nine char").await,
        };
        let found = &completion.unwrap().usage[0];
        assert_eq!((found.input_tokens, found.output_tokens), (input, output), "{usage}");
        assert_eq!(found.cost, cost, "{usage}");
    }
}

#[tokio::test]
async fn an_answer_without_text_is_paid_for() {
    let choice = |message: Json, usage: Json| json!({"choices": [{"message": message, "finish_reason": "length"}], "usage": usage});
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 8});
    let failure = |usage: Json| json!({"error": {"message": "no"}, "usage": usage});
    let refusal = |usage: Json| json!({"content": [], "stop_reason": "refusal", "usage": usage});
    // Whether it's OpenAI's, the body, and the tokens that are booked. The prompt has 9 characters.
    for (is_openai, body, tokens) in [
        (true, choice(json!({"content": null}), usage.clone()), Some((7, 8))),
        (true, choice(json!({"refusal": "no"}), usage.clone()), Some((7, 8))),
        (true, choice(json!({"content": null}), json!(null)), Some((3, 0))),
        (true, json!({"choices": [], "usage": usage}), Some((7, 8))),
        (true, failure(usage), Some((7, 8))),
        (true, failure(json!(null)), None),
        (true, json!("no"), None),
        (false, refusal(json!({"input_tokens": 5, "output_tokens": 6})), Some((5, 6))),
        (false, refusal(json!(null)), Some((3, 0))),
    ] {
        let server = always(Reply::Raw(200, Vec::new(), body.to_string()));
        let price = Some(Price { input: 1e6, output: 1e6 });
        let request = request(Prompt::Text("nine char".into()));
        let result = match is_openai {
            true => {
                let options = UpstreamOptions { price, ..options(server.openai_url()) };
                openai(options).complete(&request).await
            }
            false => {
                let options = UpstreamOptions { price, ..options(server.anthropic_url()) };
                anthropic(options).complete(&request).await
            }
        };
        let found = result.unwrap_err().usage;
        let found: Vec<_> = found
            .iter()
            .map(|usage| (usage.input_tokens, usage.output_tokens, usage.cost.unwrap()))
            .collect();
        let expected = tokens.map(|(input, output)| (input, output, (input + output) as f64));
        assert_eq!(found, Vec::from_iter(expected), "{body}");
    }
}

#[tokio::test]
async fn refusals_name_the_status_and_what_the_server_says() {
    let raw = |status, body: &str| Reply::Raw(status, Vec::new(), body.to_owned());
    let told = |status, name, value: &str, body: &str| {
        Reply::Raw(status, vec![(name, value.to_owned())], body.to_owned())
    };
    let spent = r#"{"error": {"message": "pay first", "code": "insufficient_quota"}}"#;
    let long = json!({ "error": { "message": "é".repeat(501) } }).to_string();
    let shown = format!("m: HTTP 400: {}…", "é".repeat(500));
    // The reply, the error, and how often the server was asked.
    for (reply, expected, requests) in [
        (Reply::error(400, "bad\tthing\x1b[31m"), "m: HTTP 400: bad thing [31m", 1),
        (raw(400, &long), shown.as_str(), 1),
        (raw(400, ""), "m: HTTP 400", 1),
        (raw(422, r#"{"detail": "no"}"#), "m: HTTP 422: no", 1),
        (raw(400, "plain text"), "m: HTTP 400: plain text", 1),
        (Reply::error(401, "bad key"), "m: HTTP 401: bad key (is KEY right?)", 1),
        (Reply::error(403, "not you"), "m: HTTP 403: not you (is KEY right?)", 1),
        (Reply::error(408, "slow"), "m: HTTP 408: slow (after 3 tries)", 3),
        (Reply::error(409, "locked"), "m: HTTP 409: locked (after 3 tries)", 3),
        (Reply::error(429, "easy"), "m: rate limited: HTTP 429: easy (after 3 tries)", 3),
        (raw(429, spent), "m: HTTP 429: pay first", 1),
        (Reply::error(500, "oh"), "m: HTTP 500: oh (after 3 tries)", 3),
        (Reply::error(529, "overload"), "m: HTTP 529: overload (after 3 tries)", 3),
        (told(500, "x-should-retry", "false", "no"), "m: HTTP 500: no", 1),
        (told(400, "x-should-retry", "true", "hm"), "m: HTTP 400: hm (after 3 tries)", 3),
    ] {
        let server = always(reply);
        let mut options = options(server.openai_url());
        options.key_hint = "is KEY right?".into();
        options.retries.max = 2;
        assert_eq!(say(&openai(options), "x").await, Err(expected.into()));
        assert_eq!(server.counts().requests, requests, "{expected}");
    }
    let server = always(Reply::error(404, "nothing"));
    let handler = openai(options(server.anthropic_url()));
    let expected = format!("m: HTTP 404 at {}/chat/completions: nothing", server.anthropic_url());
    assert_eq!(say(&handler, "x").await, Err(expected));
}

#[tokio::test]
async fn a_call_that_fails_is_tried_again() {
    for (name, fault) in [
        ("429", Reply::error(429, "easy")),
        ("503", Reply::error(503, "down")),
        ("529", Reply::error(529, "overload")),
        ("reset", Reply::Reset),
        ("half", Reply::HalfBody),
    ] {
        let server = ChatServer::start(ChatOptions::default(), move |request| {
            if request.number < 3 { fault.clone() } else { Reply::Text("there".into()) }
        });
        let handler = openai(options(server.openai_url()));
        assert_eq!(say(&handler, "x").await.as_deref(), Ok("there"), "{name}");
        assert_eq!(server.counts().requests, 4, "{name}");
    }
}

#[tokio::test]
async fn a_try_that_hangs_is_given_up_for_another() {
    for hanging in [Reply::Hang, Reply::HangingBody(200, Vec::new())] {
        let server =
            ChatServer::start(ChatOptions::default(), move |request| match request.number {
                0 => hanging.clone(),
                _ => Reply::Text("there".into()),
            });
        let try_timeout = Duration::from_millis(500);
        let handler = openai(UpstreamOptions { try_timeout, ..options(server.openai_url()) });
        assert_eq!(say(&handler, "x").await.as_deref(), Ok("there"));
        assert_eq!(server.counts().requests, 2);
    }
    let server = always(Reply::Hang);
    let mut options = options(server.openai_url());
    options.try_timeout = Duration::from_millis(50);
    options.retries.max = 2;
    let error = say(&openai(options), "x").await.unwrap_err();
    assert_eq!(error, "m: no answer within 50ms (after 3 tries)");
    assert_eq!(server.counts().requests, 3);
}

#[tokio::test]
async fn an_error_whose_body_hangs_keeps_its_status() {
    let told = vec![("retry-after", "61".to_owned())];
    let server = always(Reply::HangingBody(429, told));
    let standard = options(server.openai_url());
    let short = UpstreamOptions { try_timeout: Duration::from_millis(500), ..standard.clone() };
    for options in [short, standard] {
        let start = Instant::now();
        let error = say(&openai(options), "x").await.unwrap_err();
        let expected = "m: rate limited: HTTP 429 (the server asks to wait for 61s; at most 60s";
        assert!(error.starts_with(expected), "{error}");
        // Long before the call's own limit of a minute.
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}

#[tokio::test]
async fn retry_after_is_kept_to() {
    let in_two_seconds = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
    for (name, value, least) in [
        ("retry-after-ms", "80".to_owned(), 80),
        ("retry-after", "0.08".to_owned(), 80),
        ("retry-after", "1".to_owned(), 1000),
        // A date has whole seconds, and some of the time has passed already.
        ("retry-after", in_two_seconds, 1),
    ] {
        let told = vec![(name, value.clone())];
        let server =
            ChatServer::start(ChatOptions::default(), move |request| match request.number {
                0 => Reply::Raw(429, told.clone(), String::new()),
                _ => Reply::Text("there".into()),
            });
        let handler = openai(options(server.openai_url()));
        let start = Instant::now();
        assert_eq!(say(&handler, "x").await.as_deref(), Ok("there"), "{name}");
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(least), "{name} {value}: {took:?}");
    }
    for (name, value) in [("retry-after", "61"), ("retry-after-ms", "1e99")] {
        let server = always(Reply::Raw(429, vec![(name, value.to_owned())], "easy".into()));
        let error = say(&openai(options(server.openai_url())), "x").await.unwrap_err();
        assert!(error.starts_with("m: rate limited: HTTP 429: easy (the server asks to wait for "));
        assert!(error.ends_with("; at most 60s are waited)"), "{error}");
        assert_eq!(server.counts().requests, 1);
    }
}

#[tokio::test]
async fn no_try_begins_that_would_be_too_late() {
    let server = always(Reply::error(503, "down"));
    let mut options = options(server.openai_url());
    options.retries.base = Duration::from_secs(3000);
    options.retries.cap = Duration::from_secs(3000);
    assert_eq!(
        say(&openai(options), "x").await.unwrap_err(),
        "m: HTTP 503: down, and the next would begin beyond the limit of 60s"
    );
    assert_eq!(server.counts().requests, 1);
}

#[tokio::test]
async fn every_fault_has_its_own_words() {
    let short = Duration::from_millis(150);
    let drip = Reply::Drip("a".repeat(1000), Duration::from_millis(20));
    let huge = |declared| Reply::Huge { bytes: 64 << 20, declared };
    let to = "https://user:pw@elsewhere.example/v1?x=1".to_owned();
    for (reply, timeout, expected) in [
        (Reply::Hang, short, "m: no answer within 150ms"),
        (drip, short, "m: no answer within 150ms"),
        (Reply::HalfBody, Duration::MAX, "m: the answer broke off in the middle"),
        (huge(true), Duration::MAX, "m: the answer is larger than 16777216 bytes"),
        (huge(false), Duration::MAX, "m: the answer is larger than 16777216 bytes"),
        (Reply::Reset, Duration::MAX, "m: HOST reset the connection"),
        (
            Reply::Redirect(to),
            Duration::MAX,
            "m: HTTP 307: redirected to elsewhere.example; redirects are not followed, so that the \
             key stays here: if that is right, write the new address as the base URL",
        ),
    ] {
        let server = always(reply);
        let standard = options(server.openai_url());
        let timeout = timeout.min(standard.timeout);
        let handler = openai(UpstreamOptions { timeout, retries: Retries::NONE, ..standard });
        let expected = expected.replace("HOST", &server.address().to_string());
        assert_eq!(say(&handler, "x").await, Err(expected));
        server.until(|counts| counts.in_flight == 0).await;
        assert_eq!(server.counts().requests, 1);
    }
}

#[tokio::test]
async fn every_way_not_to_connect_has_its_own_words() {
    let server = ChatServer::echo();
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    // A name that can't be one, so that nobody is asked for it.
    let no_name = "a".repeat(64) + ".invalid";
    for (base_url, expected) in [
        (
            format!("http://{closed}/v1"),
            format!("m: no connection to {closed}: connection refused; does the server run?"),
        ),
        (
            format!("http://{no_name}/v1"),
            format!("m: no address of {no_name} was found; is the name right?"),
        ),
        (
            format!("https://{}/v1", server.address()),
            format!("m: no secure connection to {}: received corrupt message", server.address()),
        ),
    ] {
        let retries = Retries::NONE;
        let handler = openai(UpstreamOptions { retries, ..options(base_url) });
        let error = say(&handler, "x").await.unwrap_err();
        assert!(error.starts_with(&expected), "{error}");
    }
    let handler = openai(options(format!("http://{closed}/v1")));
    let error = say(&handler, "x").await.unwrap_err();
    assert!(error.ends_with("does the server run? (after 5 tries)"), "{error}");
}

#[tokio::test]
async fn a_storm_of_429_passes() {
    let limits = ChatOptions {
        latency: Duration::from_millis(2),
        in_flight_max: Some(4),
        retry_after: Some("0".into()),
        ..ChatOptions::default()
    };
    let server = ChatServer::start(limits, |request| request.prompt().to_owned());
    let mut options = options(server.openai_url());
    options.retries.max = 1000;
    options.retries.cap = Duration::from_millis(50);
    options.concurrency = 32;
    let handler = openai(options);
    let answers = join_all((0..200).map(|number| {
        let (handler, text) = (&handler, number.to_string());
        async move { say(handler, &text).await == Ok(text) }
    }));
    assert!(answers.await.into_iter().all(|is_right| is_right));
    let counts = server.counts();
    assert_eq!(counts.requests - counts.rate_limited, 200);
    assert!(counts.rate_limited > 0 && counts.in_flight_max <= 32, "{counts:?}");
}

#[tokio::test]
async fn a_rate_per_second_is_waited_for() {
    let limits = ChatOptions {
        jitter: Duration::from_millis(10),
        per_second_max: Some(20),
        retry_after: Some("0.2".into()),
        ..ChatOptions::default()
    };
    let server = ChatServer::start(limits, |_| "a");
    let mut options = options(server.openai_url());
    options.retries.max = 50;
    let handler = openai(options);
    let answers = join_all((0..30).map(|_| say(&handler, "x"))).await;
    assert!(answers.iter().all(Result::is_ok));
    let counts = server.counts();
    assert!(counts.rate_limited > 0, "{counts:?}");
    assert_eq!(counts.requests - counts.rate_limited, 30);
}

#[tokio::test]
async fn dropping_a_call_ends_it() {
    let drip = Reply::Drip("a".repeat(100_000), Duration::from_millis(2));
    let endless = Reply::Huge { bytes: u64::MAX, declared: false };
    for reply in [Reply::Hang, drip, endless] {
        let server = always(reply);
        let answer_bytes_max = usize::MAX;
        let handler =
            Arc::new(openai(UpstreamOptions { answer_bytes_max, ..options(server.openai_url()) }));
        let calls: Vec<_> = (0..5)
            .map(|_| {
                let handler = Arc::clone(&handler);
                tokio::spawn(async move { say(&*handler, "x").await })
            })
            .collect();
        server.until(|counts| counts.in_flight == 5).await;
        calls.iter().for_each(tokio::task::JoinHandle::abort);
        let counts = server.until(|counts| counts.in_flight == 0).await;
        assert_eq!(counts.cancelled, 5);
        for call in calls {
            assert!(call.await.unwrap_err().is_cancelled());
        }
    }
}

#[tokio::test]
async fn a_call_waits_for_its_turn() {
    let latency = Duration::from_millis(5);
    let server = ChatServer::start(ChatOptions { latency, ..ChatOptions::default() }, |_| "a");
    let handler = openai(UpstreamOptions { concurrency: 3, ..options(server.openai_url()) });
    let answers = join_all((0..40).map(|_| say(&handler, "x"))).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(server.counts().in_flight_max, 3);

    let server = always(Reply::Hang);
    let timeout = Duration::from_millis(150);
    let standard = options(server.openai_url());
    let handler = openai(UpstreamOptions { concurrency: 1, timeout, ..standard });
    let errors = join_all((0..10).map(|_| say(&handler, "x"))).await;
    let errors: std::collections::BTreeSet<_> =
        errors.into_iter().map(Result::unwrap_err).collect();
    let expected = [
        "m: no answer within 150ms",
        "m: no turn within 150ms: there were 1 calls under way all the time",
    ];
    assert_eq!(errors, expected.map(str::to_owned).into());
}

#[tokio::test]
async fn connections_are_used_again() {
    let server = ChatServer::echo();
    let handler = openai(options(server.openai_url()));
    for _ in 0..50 {
        say(&handler, "x").await.unwrap();
    }
    assert_eq!(server.counts().connections, 1);
    for _ in 0..3 {
        let answers = join_all((0..1000).map(|_| say(&handler, "x"))).await;
        assert!(answers.iter().all(Result::is_ok));
    }
    let counts = server.counts();
    assert_eq!(counts.requests, 3050);
    assert!(counts.connections <= 600 && counts.in_flight_max <= 256, "{counts:?}");
}

#[tokio::test]
async fn a_thousand_calls_go_at_once_where_that_is_allowed() {
    let latency = Duration::from_millis(300);
    let server = ChatServer::start(ChatOptions { latency, ..ChatOptions::default() }, |_| "a");
    let handler = openai(UpstreamOptions { concurrency: 1000, ..options(server.openai_url()) });
    let answers = join_all((0..1000).map(|_| say(&handler, "x"))).await;
    assert!(answers.iter().all(Result::is_ok));
    let counts = server.counts();
    assert_eq!((counts.requests, counts.cancelled), (1000, 0));
}

#[tokio::test]
async fn secrets_are_not_seen() {
    let server = always(Reply::error(401, &format!("no such key: {KEY}, team blue-team-secret")));
    let options = UpstreamOptions {
        key: Some(Secret::new(KEY)),
        headers: vec![("x-team".into(), Secret::new("blue-team-secret"))],
        proxy: Some(HttpProxy {
            url: Secret::new(format!("http://me:proxy-secret@{}", server.address())),
            source: String::new(),
            except: "127.0.0.1".into(),
        }),
        ..options(server.openai_url())
    };
    let mut shown = format!("{options:?}");
    shown += &format!("{:?}", anthropic(options.clone()));
    let handler = openai(options);
    shown += &format!("{handler:?}");
    let error = say(&handler, "x").await.unwrap_err();
    assert_eq!(error, "m: HTTP 401: no such key: [secret], team [secret]");

    // Not even where a message is cut.
    let server = always(Reply::error(400, &("x".repeat(490) + KEY)));
    let key = Some(Secret::new(KEY));
    let handler = openai(UpstreamOptions { key, ..self::options(server.openai_url()) });
    let error = say(&handler, "x").await.unwrap_err();
    assert!(error.ends_with("x[secret]"), "{error}");
    for secret in [KEY, "blue-team-secret", "proxy-secret"] {
        assert!(!shown.contains(secret), "{secret}: {shown}");
    }
}

#[tokio::test]
async fn a_proxy_is_used_where_it_is_given() {
    let server = ChatServer::start(ChatOptions { record: true, ..ChatOptions::default() }, |_| "a");
    let proxy = |except: &str| {
        let url = Secret::new(format!("http://me:pw@{}", server.address()));
        Some(HttpProxy { url, source: "http_proxy".into(), except: except.into() })
    };
    let far = options("http://far.invalid/v1");
    let handler = openai(UpstreamOptions { proxy: proxy("localhost"), ..far.clone() });
    assert_eq!(say(&handler, "x").await.as_deref(), Ok("a"));
    let [asked] = server.requests().try_into().unwrap();
    assert_eq!(header(&asked, "host"), Some("far.invalid"));
    assert_eq!(header(&asked, "proxy-authorization"), Some("Basic bWU6cHc="));

    // Only the name's own addresses would do here, and it has none.
    let retries = Retries::NONE;
    let except = proxy("10.0.0.0/8, 127.0.0.1");
    let other = always(Reply::Text("b".into()));
    let direct = UpstreamOptions { proxy: except, retries, ..options(other.openai_url()) };
    assert_eq!(say(&openai(direct), "x").await.as_deref(), Ok("b"));

    // One that isn't there is named, without its password; where it isn't used it may be of any kind.
    let gone = |url: &str, except: &str| {
        let (url, except) = (Secret::new(url), except.to_owned());
        Some(HttpProxy { url, source: "http_proxy".into(), except })
    };
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = gone(&format!("http://me:pw@{closed}"), "");
    let error = say(&openai(UpstreamOptions { proxy, retries, ..far }), "x").await.unwrap_err();
    assert_eq!(
        error,
        format!(
            "m: no connection to the proxy {closed} (http_proxy): connection refused; does the \
             server run?"
        )
    );
    let proxy = gone("socks5://127.0.0.1:1", "127.0.0.0/8");
    let unused = UpstreamOptions { proxy, ..options(other.openai_url()) };
    assert_eq!(say(&openai(unused), "x").await.as_deref(), Ok("b"));
}

#[test]
fn options_that_cannot_be_used_are_refused() {
    type Change = fn(&mut UpstreamOptions);
    fn proxy(url: &str, source: &str) -> HttpProxy {
        HttpProxy { url: Secret::new(url), source: source.into(), except: String::new() }
    }
    let cases: Vec<(Change, &str)> = vec![
        (|o| o.base_url = Some("host/v1".into()), "base_url: it is no URL"),
        (|o| o.base_url = Some("ftp://host".into()), "base_url: it must begin with https://"),
        (|o| o.base_url = Some("http://a:b@host".into()), "base_url: a user and a password"),
        (|o| o.base_url = Some("http://host/?key=b".into()), "base_url: leave out what begins"),
        (|o| o.key = Some(Secret::new("a\nb")), "header authorization: the key or value has"),
        (|o| o.headers = vec![("a b".into(), Secret::new(""))], "headers: \"a b\" can't be"),
        (|o| o.timeout = Duration::ZERO, "timeout: it must be more than 0"),
        (|o| o.try_timeout = Duration::ZERO, "try_timeout: it must be more than 0"),
        (|o| o.timeout = Duration::MAX, "timeout: it must be at most 24 hours"),
        (|o| o.connect_timeout = Duration::ZERO, "connect_timeout: it must be more than 0"),
        (|o| o.concurrency = 0, "concurrency: it must be between 1 and 65536"),
        (|o| o.concurrency = usize::MAX, "concurrency: it must be between 1 and 65536"),
        (|o| o.output_tokens_max = Some(0), "output_tokens_max: it must be more than 0"),
        (|o| o.price = Some(Price { input: -1.0, output: 0.0 }), "price: it must be a number"),
        (|o| o.price = Some(Price { input: 0.0, output: f64::NAN }), "price: it must be a number"),
        (|o| drop(o.parameters.insert("stream".into(), true.into())), "parameters.stream: the"),
        (|o| o.proxy = Some(proxy("socks5://h:1", "")), "proxy: only http:// and https:// proxies"),
        (|o| o.proxy = Some(proxy("http://", "")), "proxy: it is no address"),
        (
            |o| o.proxy = Some(proxy("socks5://me:pw@h:1", "http_proxy")),
            "http_proxy: only http:// and https:// proxies",
        ),
    ];
    for (change, expected) in cases {
        let mut options = UpstreamOptions::default();
        change(&mut options);
        let error = OpenAiHandler::new("m", options).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let error = OpenAiHandler::new(" ", UpstreamOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("model: the name is empty"), "{error}");
}
