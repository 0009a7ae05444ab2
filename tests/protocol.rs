//! RLM's LM handler protocol: the bytes of rlms 0.1.3 both ways, and servers that break it.
//!
//! The failure guarded against: a server that stalls, lies about a length or sends garbage takes
//! the host down, or its words reach the guest in another form than RLM's client would give them.
//! Each test lets a local server play one such part, one connection at a time. The goldens were
//! recorded from `rlm.core.lm_handler.LMHandler`.

use std::time::{Duration, Instant};

use kaa::lm::{LmCompletion, LmError, LmHandler, LmKind, LmRequest, ModelUsage, Prompt};
use kaa::lm::{ScriptedHandler, SocketHandler};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const GOOD: &str = concat!(
    r#"{"chat_completion": {"root_model": "mock", "prompt": "hi", "response": "\u00e9:hi", "#,
    r#""usage_summary": {"model_usage_summaries": {"mock": {"total_calls": 1, "#,
    r#""total_input_tokens": 2, "total_output_tokens": 3}}}, "execution_time": 1.5e-06}, "#,
    r#""chat_completions": null, "error": null}"#,
);
const GOOD_BATCH: &str = concat!(
    r#"{"chat_completions": [{"root_model": "sub", "prompt": "a", "response": "\u00e9:a", "#,
    r#""usage_summary": {"model_usage_summaries": {"sub": {"total_calls": 1, "#,
    r#""total_input_tokens": 2, "total_output_tokens": 3}}}, "execution_time": 0.0003}, "#,
    r#"{"root_model": "sub", "prompt": "boom", "response": "", "#,
    r#""usage_summary": {"model_usage_summaries": {}}, "execution_time": 0.0, "#,
    r#""error": "llm() call failed - kaput"}], "chat_completion": null, "error": null}"#,
);
const NO_COMPLETION: &str = "LM query failed - 'NoneType' object has no attribute 'response'";

/// What the server does once it has read the request.
#[derive(Clone)]
enum Step {
    /// One write, then a pause long enough to make it a packet of its own.
    Write(Vec<u8>),
    /// Waits until the client closes.
    Hang,
}

fn frame(payload: &str) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&length.to_be_bytes()[..], payload.as_bytes()].concat()
}

fn reply(payload: &str) -> Vec<Step> {
    vec![Step::Write(frame(payload))]
}

/// Serves one connection by `steps`; the task returns what the client sent.
async fn serve(steps: Vec<Step>) -> (SocketHandler, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let received = read_request(&mut stream).await;
        for step in steps {
            match step {
                Step::Write(bytes) => {
                    // A client that has given up is no fault of the server's.
                    let _ = stream.write_all(&bytes).await;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Step::Hang => {
                    let rest = stream.read(&mut [0]).await;
                    assert!(!matches!(rest, Ok(1..)), "the client sent more than one frame");
                }
            }
        }
        received
    });
    (SocketHandler::new(address).unwrap(), server)
}

/// Reads as RLM's server does: the header with a single `recv`.
async fn read_request(stream: &mut TcpStream) -> Vec<u8> {
    let mut received = vec![0; 4];
    assert_eq!(stream.read(&mut received).await.unwrap(), 4, "the header was split");
    let length = u32::from_be_bytes(received[..4].try_into().unwrap());
    received.resize(4 + length as usize, 0);
    stream.read_exact(&mut received[4..]).await.unwrap();
    received
}

fn request(prompt: &str) -> LmRequest {
    LmRequest { kind: LmKind::Llm, prompt: Prompt::Text(prompt.into()), model: None, depth: 1 }
}

fn completion(model: &str, response: &str, execution_time: Duration) -> LmCompletion {
    let usage = vec![ModelUsage {
        model: model.into(),
        calls: 1,
        input_tokens: 2,
        output_tokens: 3,
        cost: None,
    }];
    LmCompletion {
        model: model.into(),
        response: response.into(),
        usage,
        execution_time,
        ..LmCompletion::default()
    }
}

/// The error that one call gets from a server with these steps.
async fn error_of(steps: Vec<Step>) -> String {
    let (handler, server) = serve(steps).await;
    let error = handler.complete(&request("hi")).await.unwrap_err();
    server.await.unwrap();
    error.message
}

/// The errors that a batch of three gets from a server with these steps.
async fn batch_errors_of(steps: Vec<Step>) -> Vec<String> {
    let (handler, server) = serve(steps).await;
    let requests = ["a", "b", "c"].map(request).to_vec();
    let answers = handler.complete_batch(&requests, 16).await;
    server.await.unwrap();
    answers.into_iter().map(|answer| answer.unwrap_err().message).collect()
}

#[tokio::test]
async fn a_request_is_one_frame_with_pythons_bytes() {
    let mut recursive = request("h\u{e9}");
    recursive.kind = LmKind::Rlm;
    let mut chat = request("");
    chat.prompt = Prompt::Messages(json!([{"content": "hi", "role": "user"}]));
    chat.model = Some("m\"".into());
    chat.depth = 3;
    for (request, length, expected) in [
        (request("h\u{e9}"), 0x21, r#"{"prompt": "h\u00e9", "depth": 1}"#),
        (recursive, 0x21, r#"{"prompt": "h\u00e9", "depth": 1}"#),
        (request(""), 0x1a, r#"{"prompt": "", "depth": 1}"#),
        (
            chat,
            0x4b,
            r#"{"prompt": [{"content": "hi", "role": "user"}], "model": "m\"", "depth": 3}"#,
        ),
    ] {
        let (handler, server) = serve(reply(GOOD)).await;
        handler.complete(&request).await.unwrap();
        let received = server.await.unwrap();
        assert_eq!(received[..4], [0, 0, 0, length], "{expected}");
        assert_eq!(String::from_utf8_lossy(&received[4..]), expected);
    }
}

#[tokio::test]
async fn a_batch_is_one_request() {
    let with_model = |prompt| LmRequest { model: Some("m".into()), ..request(prompt) };
    let (handler, server) = serve(reply(GOOD_BATCH)).await;
    let answers = handler.complete_batch(&[with_model("a"), with_model("b")], 1).await;
    let received = server.await.unwrap();
    assert_eq!(received[..4], [0, 0, 0, 0x31]);
    let payload = String::from_utf8_lossy(&received[4..]);
    assert_eq!(payload, r#"{"prompts": ["a", "b"], "model": "m", "depth": 1}"#);
    let expected = [
        Ok(completion("sub", "\u{e9}:a", Duration::from_micros(300))),
        Err(LmError::new("llm() call failed - kaput")),
    ];
    assert_eq!(answers, expected);

    // Nobody listens there any more: an empty batch does not even connect.
    assert!(handler.complete_batch(&[], 1).await.is_empty());
}

#[tokio::test]
async fn reply_goldens_are_understood() {
    let error = |text: &str| {
        json!({"error": text, "chat_completion": null, "chat_completions": null}).to_string()
    };
    let missing = "Missing 'prompt' or 'prompts' in request.";
    let good = Ok(completion("mock", "\u{e9}:hi", Duration::from_nanos(1500)));
    for (payload, expected) in [
        (GOOD.to_owned(), good),
        (error("kaput"), Err("kaput")),
        (error(missing), Err(missing)),
        (error(""), Err("")),
        // A batched reply to a single request has no `chat_completion`.
        (GOOD_BATCH.to_owned(), Err(NO_COMPLETION)),
        ("{}".into(), Err(NO_COMPLETION)),
        (error("x").replace("\"x\"", "null"), Err(NO_COMPLETION)),
    ] {
        let (handler, server) = serve(reply(&payload)).await;
        let answer = handler.complete(&request("hi")).await;
        assert_eq!(answer, expected.map_err(LmError::new), "{payload}");
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_reply_may_come_in_any_pieces() {
    let bytes = frame(GOOD);
    let pieces = |cuts: &[usize]| {
        let mut steps = Vec::new();
        let mut start = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            steps.push(Step::Write(bytes[start..cut].to_vec()));
            start = cut;
        }
        steps
    };
    for cuts in [&[][..], &[1, 2, 3, 4], &[2, 100], &[4, 5, 150, 151]] {
        let (handler, server) = serve(pieces(cuts)).await;
        let answer = handler.complete(&request("hi")).await.unwrap();
        assert_eq!(answer.response, "\u{e9}:hi", "{cuts:?}");
        server.await.unwrap();
    }
    // What follows the first frame is not read.
    let (handler, server) = serve(vec![Step::Write([&bytes[..], &frame("junk")].concat())]).await;
    assert_eq!(handler.complete(&request("hi")).await.unwrap().model, "mock");
    server.await.unwrap();
}

#[tokio::test]
async fn faults_of_a_single_call_become_errors() {
    let write = |bytes: &[u8]| vec![Step::Write(bytes.to_vec())];
    let closed = "Request failed: Connection closed before message complete";
    let unreadable = "Request failed: the reply can't be read: ";
    let half = frame(GOOD)[..200].to_vec();
    let deep = "[".repeat(1 << 20);
    for (name, steps, expected) in [
        ("closes before the header", vec![], NO_COMPLETION),
        ("half a header", write(b"\0\0"), closed),
        ("half a body", vec![Step::Write(half)], closed),
        (
            "claims 4 GiB",
            vec![Step::Write(b"\xff\xff\xff\xff{}".to_vec()), Step::Hang],
            "Request failed: a frame of 4294967295 bytes exceeds the maximum of 134217756",
        ),
        ("empty payload", reply(""), unreadable),
        ("garbage", reply("{bad"), unreadable),
        ("not UTF-8", write(b"\0\0\0\x0f{\"error\": \"\xff\xfe\"}"), unreadable),
        ("an array", reply("[1]"), unreadable),
        ("the fields as an array", reply(r#"["kaput", null, null]"#), unreadable),
        ("two values", reply("{} {}"), unreadable),
        ("deep nesting", reply(&deep), unreadable),
        ("wrong types", reply(r#"{"chat_completion": 7}"#), unreadable),
        ("no response", reply(r#"{"chat_completion": {"prompt": "hi"}}"#), unreadable),
    ] {
        let error = error_of(steps).await;
        assert!(error.starts_with(expected), "{name}: {error}");
    }
}

#[tokio::test]
async fn faults_of_a_batch_fill_every_slot() {
    let batch = |elements: &str| reply(&format!(r#"{{"chat_completions": [{elements}]}}"#));
    let unreadable = "Request failed: the reply can't be read: ";
    let none = "No completions returned";
    for (name, steps, expected) in [
        ("closes before the header", vec![], none),
        ("no list", reply(GOOD), none),
        ("null list", reply(r#"{"chat_completions": null}"#), none),
        ("empty list", batch(""), none),
        ("refused", reply(r#"{"error": "kaput"}"#), "kaput"),
        (
            "too few",
            reply(GOOD_BATCH),
            "LM query failed - the handler sent 2 completions for 3 prompts",
        ),
        (
            "too many",
            batch(r#"{"response": ""}, {"response": ""}, {"response": ""}, {"response": ""}"#),
            "LM query failed - the handler sent 4 completions for 3 prompts",
        ),
        ("garbage", reply("nonsense"), unreadable),
        ("wrong element", batch("1, 2, 3"), unreadable),
        ("no list at all", reply(r#"{"chat_completions": {}}"#), unreadable),
        ("null elements", batch("null, null, null"), NO_COMPLETION),
    ] {
        let errors = batch_errors_of(steps).await;
        assert_eq!(errors.len(), 3, "{name}");
        for error in errors {
            assert!(error.starts_with(expected), "{name}: {error}");
        }
    }
}

#[tokio::test]
async fn one_failed_slot_leaves_the_others() {
    let payload = r#"{"chat_completions": [
        {"response": "one"}, null, {"response": "", "error": "llm() call failed - no"},
        {"response": "four", "error": ""}]}"#;
    let (handler, server) = serve(reply(payload)).await;
    let requests = ["1", "2", "3", "4"].map(request).to_vec();
    let answers = handler.complete_batch(&requests, 16).await;
    server.await.unwrap();
    let answers: Vec<_> = answers
        .iter()
        .map(|answer| answer.as_ref().map(|c| c.response.as_str()).map_err(|e| e.message.as_str()))
        .collect();
    assert_eq!(answers, [Ok("one"), Err(NO_COMPLETION), Err("llm() call failed - no"), Ok("four")]);
}

#[tokio::test]
async fn odd_but_valid_replies_keep_the_answer() {
    let good = |fields: &str| format!(r#"{{"chat_completion": {{{fields}}}, "new": [1]}}"#);
    let usage = |cost| ModelUsage { model: "m".into(), calls: 2, cost, ..ModelUsage::default() };
    for (fields, response, usages) in [
        (r#""response": """#, "", vec![]),
        (r#""response": "a", "usage_summary": null, "execution_time": -1"#, "a", vec![]),
        (r#""response": "a", "execution_time": 1e300, "metadata": {"x": 1}"#, "a", vec![]),
        (r#""response": "\ud83d half", "prompt": "\ude00""#, "\u{fffd} half", vec![]),
        (r#""response": "\ud83d\ude00 \\ud83d""#, "\u{1f600} \\ud83d", vec![]),
        (
            r#""response": "a", "usage_summary": {"model_usage_summaries":
               {"m": {"total_calls": 2, "total_input_tokens": null, "total_cost": 0.5}},
               "total_cost": 0.5}"#,
            "a",
            vec![usage(Some(0.5))],
        ),
        (
            r#""response": "a",
               "usage_summary": {"model_usage_summaries": {"m": {"total_calls": 2}}}"#,
            "a",
            vec![usage(None)],
        ),
    ] {
        let (handler, server) = serve(reply(&good(fields))).await;
        let answer = handler.complete(&request("hi")).await.unwrap();
        let expected = (response, usages, Duration::ZERO);
        assert_eq!((&*answer.response, answer.usage, answer.execution_time), expected, "{fields}");
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_hanging_server_costs_only_the_timeout() {
    let mut trickle = vec![Step::Write(b"\0\0\x10\0".to_vec())];
    trickle.extend(vec![Step::Write(b" ".to_vec()); 60]);
    for steps in [
        vec![Step::Hang],
        vec![Step::Write(b"\0\0".to_vec()), Step::Hang],
        vec![Step::Write(b"\0\0\0\x05hi".to_vec()), Step::Hang],
        // Bytes that keep coming must not restart the clock.
        trickle,
    ] {
        let (handler, server) = serve(steps).await;
        let handler = handler.with_timeout(Duration::from_millis(50));
        let start = Instant::now();
        let error = handler.complete(&request("hi")).await.unwrap_err();
        assert_eq!(error.message, "Request failed: timed out after 50ms");
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        // It ends only when the client has closed the connection.
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_dropped_call_closes_its_connection() {
    let (handler, server) = serve(vec![Step::Hang]).await;
    let request = request("hi");
    let call = handler.complete(&request);
    assert!(tokio::time::timeout(Duration::from_millis(50), call).await.is_err());
    tokio::time::timeout(Duration::from_secs(5), server).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refused_connection_is_worded_as_python_does() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let handler = SocketHandler::new(address).unwrap();
    let mut errors = vec![handler.complete(&request("hi")).await];
    errors.extend(handler.complete_batch(&[request("a"), request("b")], 16).await);
    for error in errors {
        let message = error.unwrap_err().message;
        assert!(message.starts_with("Request failed: [Errno "), "{message}");
        assert!(message.ends_with("] Connection refused"), "{message}");
    }
}

#[tokio::test]
async fn the_cap_on_replies_is_exact() {
    // What the request has is allowed on top: the reply repeats it.
    let beyond = GOOD.len() - r#"{"prompt": "hi", "depth": 1}"#.len();
    for (bytes_max, expected) in [(beyond, true), (beyond - 1, false)] {
        let (handler, server) = serve(reply(GOOD)).await;
        let answer = handler.with_reply_bytes_max(bytes_max).complete(&request("hi")).await;
        assert_eq!(answer.is_ok(), expected, "{answer:?}");
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_mixed_batch_is_split_where_the_model_changes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let handler = SocketHandler::new(listener.local_addr().unwrap().to_string()).unwrap();
    let server = tokio::spawn(async move {
        let mut payloads = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let received = read_request(&mut stream).await;
            let sent: serde_json::Value = serde_json::from_slice(&received[4..]).unwrap();
            let answers: Vec<_> = sent["prompts"].as_array().unwrap().iter().collect();
            let answers: Vec<_> = answers.iter().map(|p| json!({"response": p})).collect();
            let reply = json!({"chat_completions": answers}).to_string();
            stream.write_all(&frame(&reply)).await.unwrap();
            payloads.push(String::from_utf8(received[4..].to_vec()).unwrap());
        }
        payloads
    });
    let requests = vec![request("a"), request("b"), LmRequest { depth: 2, ..request("c") }];
    let answers = handler.complete_batch(&requests, 16).await;
    let texts: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().response).collect();
    assert_eq!(texts, ["a", "b", "c"]);
    let expected = [r#"{"prompts": ["a", "b"], "depth": 1}"#, r#"{"prompts": ["c"], "depth": 2}"#];
    assert_eq!(server.await.unwrap(), expected);
}

/// A host keeps either kind of handler behind the trait.
#[tokio::test]
async fn handlers_are_objects() {
    let (socket, server) = serve(reply(GOOD)).await;
    let handlers: [Box<dyn LmHandler>; 2] = [Box::new(socket), Box::new(ScriptedHandler::echo())];
    for (handler, expected) in handlers.iter().zip(["\u{e9}:hi", "hi"]) {
        assert_eq!(handler.complete(&request("hi")).await.unwrap().response, expected);
    }
    server.await.unwrap();
}
