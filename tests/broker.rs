//! The broker that runs in a sandbox, as a process of this machine: its protocol, and what it withstands.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kaa::Error;
use kaa::broker::{Broker, BrokerOptions, SCRIPT};
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest, Secret};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const HOST: &str = "host-token-0123456789";
const GUEST: &str = "guest-token-0123456789";

/// A broker, which ends with the test.
struct Running {
    process: Child,
    port: u16,
}

impl Running {
    fn start(more: &Json) -> Self {
        let (process, line) = launch(more);
        let port = line["port"].as_u64().unwrap_or_else(|| panic!("it says {line}")) as u16;
        Self { process, port }
    }

    fn send(&self, request: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request).unwrap();
        stream
    }

    fn call(&self, method: &str, path: &str, token: &str, body: Option<&Json>) -> (u16, Json) {
        let body = body.map(Json::to_string);
        read(self.send(&head(method, path, token, body.as_deref())))
    }

    fn enqueue(&self, body: Json) -> thread::JoinHandle<(u16, Json)> {
        let stream = self.send(&head("POST", "/enqueue", GUEST, Some(&body.to_string())));
        thread::spawn(move || read(stream))
    }

    fn pending(&self, query: &str) -> Json {
        let (status, found) = self.call("GET", &format!("/pending?{query}"), HOST, None);
        assert_eq!(status, 200, "{found}");
        found
    }

    fn ids(&self, query: &str) -> Vec<String> {
        let found = self.pending(query);
        let items = found["pending"].as_array().unwrap();
        items.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    }

    fn respond(&self, id: &str, text: &str) -> (u16, Json) {
        let body = json!({"id": id, "response": {"response": text}});
        self.call("POST", "/respond", HOST, Some(&body))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let until = Instant::now() + Duration::from_secs(10);
        while self.process.try_wait().unwrap().is_none() {
            if Instant::now() > until {
                self.process.kill().unwrap();
                self.process.wait().unwrap();
                if !thread::panicking() {
                    panic!("the broker outlived its stdin");
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Starts a broker with these settings besides tokens and address; and what it says first.
fn launch(more: &Json) -> (Child, Json) {
    let mut settings =
        json!({"host_token": HOST, "guest_token": GUEST, "bind": "127.0.0.1", "port": 0});
    for (name, value) in more.as_object().unwrap() {
        settings[name] = value.clone();
    }
    let mut process = Command::new("python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(process.stdin.as_mut().unwrap(), "{settings}").unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (process, serde_json::from_str(&line).unwrap())
}

fn head(method: &str, path: &str, token: &str, body: Option<&str>) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n");
    if !token.is_empty() {
        text += &format!("Authorization: Bearer {token}\r\n");
    }
    if let Some(body) = body {
        text += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
    } else {
        text += "\r\n";
    }
    text.into_bytes()
}

fn read(mut stream: TcpStream) -> (u16, Json) {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap_or_else(|| panic!("{answer:?}")).parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, serde_json::from_str(body).unwrap())
}

#[test]
fn each_token_opens_its_own_endpoints_only() {
    let broker = Running::start(&json!({}));
    let late = json!({"type": "single", "timeout": 0});
    let answer = json!({"id": "a", "response": {}});
    for (method, path, body, [nobody, stranger, guest, host]) in [
        ("GET", "/health", None, [200, 200, 200, 200]),
        ("POST", "/health", None, [405, 405, 405, 405]),
        ("POST", "/enqueue", Some(&late), [401, 401, 504, 403]),
        ("GET", "/enqueue", None, [401, 401, 405, 403]),
        ("GET", "/pending", None, [401, 401, 403, 200]),
        ("DELETE", "/pending", None, [401, 401, 403, 405]),
        ("POST", "/respond", Some(&answer), [401, 401, 403, 404]),
        ("GET", "/respond", None, [401, 401, 403, 405]),
        ("GET", "/", None, [401, 401, 404, 404]),
        ("GET", "/health/", None, [401, 401, 404, 404]),
    ] {
        let tokens =
            [("", nobody), ("host-token-012345678", stranger), (GUEST, guest), (HOST, host)];
        for (token, expected) in tokens {
            let (status, said) = broker.call(method, path, token, body);
            assert_eq!(status, expected, "{method} {path} with {token:?}: {said}");
            assert_eq!(said["error"].is_string(), status != 200, "{said}");
            assert_eq!(said["code"].is_string(), status != 200, "{said}");
        }
    }
    assert_eq!(broker.call("GET", "/health", "", None).1, json!({"status": "ok"}));
}

#[test]
fn what_can_t_be_used_is_refused() {
    let broker = Running::start(&json!({"request_bytes_max": 1000}));
    let deep = format!("{{\"type\": \"single\", \"prompt\": {}}}", "[".repeat(900));
    for (path, token, body, expected) in [
        ("/enqueue", GUEST, "", 400),
        ("/enqueue", GUEST, "{", 400),
        ("/enqueue", GUEST, "[]", 400),
        ("/enqueue", GUEST, "{}", 400),
        ("/enqueue", GUEST, "{\"type\": \"single\", \"prompt\": NaN}", 400),
        ("/enqueue", GUEST, "{\"type\": \"single\", \"id\": \"a b\"}", 400),
        ("/enqueue", GUEST, "{\"type\": \"single\", \"timeout\": -1}", 400),
        ("/enqueue", GUEST, &*deep, 400),
        ("/enqueue", GUEST, &*"x".repeat(1001), 413),
        ("/respond", HOST, "{\"id\": \"a\", \"response\": \"text\"}", 400),
        ("/pending", HOST, "{\"held\": 1}", 400),
        ("/pending?wait=nan", HOST, "{\"wait\": \"nan\"}", 400),
    ] {
        let (status, said) = read(broker.send(&head("POST", path, token, Some(body))));
        assert_eq!(status, expected, "{path} {body:?}: {said}");
    }
    for (lines, expected) in [
        ("POST /enqueue HTTP/1.1\r\n", 411),
        ("POST /enqueue HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", 411),
        ("POST /enqueue HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n", 411),
        ("POST /enqueue HTTP/1.1\r\nContent-Length: -2\r\n", 411),
        ("POST /enqueue HTTP/1.1\r\nContent-Length: 99999999999999999\r\n", 413),
        ("nonsense\r\n", 400),
        ("GET / HTTP/7.0\r\n", 505),
    ] {
        let request = format!("{lines}Authorization: Bearer {GUEST}\r\nConnection: close\r\n\r\n");
        assert_eq!(read(broker.send(request.as_bytes())).0, expected, "{lines:?}");
    }
    assert!(broker.ids("").is_empty());
}

#[test]
fn an_item_is_handed_out_once_and_again_when_it_was_lost() {
    let broker = Running::start(&json!({"lease_seconds": 1}));
    let guest = broker.enqueue(json!({"type": "single", "prompt": "hi", "id": "q1"}));
    let found = broker.pending("wait=10&poller=a");
    assert_eq!(found["pending"][0]["request"]["prompt"], "hi");
    assert!(broker.ids("poller=a&held=q1").is_empty(), "it is held");
    assert!(broker.ids("poller=b").is_empty(), "it belongs to another poller");
    assert_eq!(broker.ids("poller=a"), ["q1"], "it was lost on the way");
    assert_eq!(broker.ids("poller=b&wait=10"), ["q1"], "the first poller is gone");
    let text = broker.pending("poller=b&form=text");
    let request = text["pending"][0]["request"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Json>(request).unwrap()["prompt"], "hi");
    assert_eq!(broker.respond("q1", "first"), (200, json!({"status": "ok"})));
    assert_eq!(broker.respond("q1", "second"), (200, json!({"status": "ok"})));
    assert_eq!(guest.join().unwrap(), (200, json!({"response": "first"})));
    assert_eq!(broker.pending("poller=b&held=q1")["gone"], json!(["q1"]), "another has answered");
    assert_eq!(broker.pending("held=q1")["gone"], json!([]), "its own answer is no news");
    let unknown = broker.respond("q2", "x");
    assert_eq!((unknown.0, &unknown.1["error"]), (404, &json!("Request not found")));

    // Who asks the same again by the id that it chose gets the same answer; nothing is asked anew.
    let again = broker.enqueue(json!({"type": "single", "prompt": "hi", "id": "q1"}));
    assert_eq!(again.join().unwrap(), (200, json!({"response": "first"})));
    let other = broker.enqueue(json!({"type": "single", "prompt": "ho", "id": "q1"}));
    assert_eq!(other.join().unwrap().0, 409);
}

#[test]
fn what_nobody_waits_for_any_more_is_gone() {
    let broker = Running::start(&json!({"return_seconds": 1}));
    let late = broker.enqueue(json!({"type": "single", "timeout": 1}));
    let [id] = &broker.ids("wait=10")[..] else { panic!("one item was asked") };
    assert_eq!(broker.pending(&format!("wait=10&held={id}"))["gone"], json!([id]));
    let (status, said) = late.join().unwrap();
    assert_eq!((status, &said["error"]), (504, &json!("Request timed out")));

    // Whoever chose an id may come back for the answer, for a while.
    for (body, is_waited_for) in
        [(json!({"type": "single"}), false), (json!({"type": "single", "id": "chosen"}), true)]
    {
        let stream = broker.send(&head("POST", "/enqueue", GUEST, Some(&body.to_string())));
        let [id] = &broker.ids("wait=10")[..] else { panic!("one item was asked") };
        stream.shutdown(Shutdown::Both).unwrap();
        let since = Instant::now();
        let found = broker.pending(&format!("wait=10&held={id}"));
        assert_eq!(found, json!({"pending": [], "gone": [id]}));
        assert_eq!(since.elapsed() >= Duration::from_secs(1), is_waited_for, "{body}");
    }
}

#[test]
fn many_ask_at_once_and_no_more_than_may() {
    let broker = Running::start(&json!({"items_max": 8}));
    let guests: Vec<_> = (0..8)
        .map(|n| broker.enqueue(json!({"type": "single", "prompt": n, "id": format!("q{n}")})))
        .collect();
    let mut held: Vec<String> = Vec::new();
    while held.len() < 8 {
        held.extend(broker.ids(&format!("wait=10&held={}", held.join(","))));
    }
    assert_eq!(broker.enqueue(json!({"type": "single"})).join().unwrap().0, 503);
    for id in &held {
        assert_eq!(broker.respond(id, id).0, 200);
    }
    for (n, guest) in guests.into_iter().enumerate() {
        assert_eq!(guest.join().unwrap(), (200, json!({"response": format!("q{n}")})));
    }
}

#[test]
fn slow_connections_end_and_keep_nobody_out() {
    let broker = Running::start(&json!({"connections_max": 8, "head_seconds": 1}));
    let mut slow: Vec<TcpStream> = (0..24).map(|_| broker.send(b"GET /hea")).collect();
    assert_eq!(broker.call("GET", "/pending", HOST, None).0, 200);
    let until = Instant::now() + Duration::from_secs(15);
    for stream in &mut slow {
        let mut answer = Vec::new();
        while Instant::now() < until && stream.write_all(b"l").is_ok() {
            stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            match stream.read_to_end(&mut answer) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                _ => break,
            }
        }
        assert!(answer.is_empty(), "{answer:?}");
    }
    assert!(Instant::now() < until, "slow connections stay open");
    assert_eq!(broker.call("GET", "/health", "", None).0, 200);
}

#[test]
fn bad_settings_are_named() {
    for (more, said) in [
        (json!({"host_token": "short"}), "host_token"),
        (json!({"guest_token": HOST}), "must differ"),
        (json!({"port": 70_000}), "port"),
        (json!({"items": 1}), "items is no setting"),
        (json!({"items_max": 0}), "items_max"),
    ] {
        let (mut process, line) = launch(&more);
        assert!(line["error"].as_str().is_some_and(|text| text.contains(said)), "{line}");
        assert_eq!(process.wait().unwrap().code(), Some(1), "{more}");
    }
}

// The host's side, against the same broker.

/// Echoes what it is asked, once `most` calls are under way together; it counts them.
struct Together {
    most: usize,
    calls: AtomicUsize,
    barrier: tokio::sync::Barrier,
}

impl Together {
    fn new(most: usize) -> Arc<Self> {
        let barrier = tokio::sync::Barrier::new(most);
        Arc::new(Self { most, calls: AtomicUsize::new(0), barrier })
    }
}

#[async_trait]
impl LmHandler for Together {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        self.calls.fetch_add(1, SeqCst);
        if self.most > 1 {
            self.barrier.wait().await;
        }
        match &*request.prompt.to_text() {
            "fail" => Err(LmError::new("no such luck")),
            "panic" => panic!("asked to"),
            text => {
                let model = request.model.as_deref().unwrap_or("none");
                let response = format!("{text} {model} {}", request.depth);
                Ok(LmCompletion { response, ..LmCompletion::default() })
            }
        }
    }
}

async fn connect(port: u16, gone_after: Duration) -> Broker {
    let url = format!("http://127.0.0.1:{port}");
    let options = BrokerOptions { gone_after, ..BrokerOptions::default() };
    Broker::connect(&url, Secret::new(HOST), options).await.unwrap()
}

async fn joined(guest: thread::JoinHandle<(u16, Json)>) -> (u16, Json) {
    tokio::task::spawn_blocking(|| guest.join().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_answers_in_rlm_s_form() {
    let broker = Running::start(&json!({}));
    let host = connect(broker.port, Duration::from_secs(5)).await;
    let handler = Together::new(1);
    let serving = tokio::spawn(async move { host.serve(handler).await });
    let long = "x".repeat(1 << 20);
    for (request, expected) in [
        (
            json!({"type": "single", "prompt": "hi", "model": "m", "depth": 1}),
            json!({"response": "hi m 1"}),
        ),
        (
            json!({"type": "single", "prompt": long, "model": null, "depth": 2}),
            json!({"response": format!("{long} none 2")}),
        ),
        (json!({"type": "single", "prompt": "fail"}), json!({"error": "no such luck"})),
        (
            json!({"type": "single", "prompt": "panic"}),
            json!({"error": "the host's handler panicked"}),
        ),
        (
            json!({"type": "batched", "prompts": ["a", "fail"], "model": "m", "depth": 1}),
            json!({"responses": ["a m 1", "Error: llm() call failed - no such luck"]}),
        ),
        (json!({"type": "batched", "prompts": []}), json!({"responses": []})),
        (json!({"type": "other"}), json!({"error": "Unknown request type"})),
        (json!({"type": "single"}), json!({"error": "Missing 'prompt' or 'prompts' in request."})),
    ] {
        assert_eq!(joined(broker.enqueue(request)).await, (200, expected));
    }
    assert!(!serving.is_finished());
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_under_way_together() {
    let broker = Running::start(&json!({}));
    let host = connect(broker.port, Duration::from_secs(5)).await;
    // None of them is answered before all four are there.
    let handler = Together::new(4);
    let calls = Arc::clone(&handler);
    let serving = tokio::spawn(async move { host.serve(handler).await });
    let guests: Vec<_> = (0..4)
        .map(|n| broker.enqueue(json!({"type": "single", "prompt": format!("{n}"), "depth": 1})))
        .collect();
    for (n, guest) in guests.into_iter().enumerate() {
        assert_eq!(joined(guest).await, (200, json!({"response": format!("{n} none 1")})));
    }
    assert_eq!(calls.calls.load(SeqCst), 4);
    serving.abort();
}

/// Passes requests on, and drops the first answer to each path that `lost` names.
async fn relay(port: u16, lost: &'static [&'static str]) -> (u16, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().port();
    let dropped = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&dropped);
    let left = Arc::new(Mutex::new(lost.to_vec()));
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let (left, count) = (Arc::clone(&left), Arc::clone(&count));
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let (mut up, mut down) = (vec![0; 1 << 16], vec![0; 1 << 16]);
                let mut asked = String::new();
                loop {
                    tokio::select! {
                        size = near.read(&mut up) => {
                            let Ok(size @ 1..) = size else { return };
                            asked += &String::from_utf8_lossy(&up[..size]);
                            far.write_all(&up[..size]).await.unwrap();
                        }
                        size = far.read(&mut down) => {
                            let Ok(size @ 1..) = size else { return };
                            let text = String::from_utf8_lossy(&down[..size]).into_owned();
                            // A poll without items may be lost unseen; what counts is one with them.
                            let is_lost = |path: &&str| {
                                asked.contains(*path)
                                    && (*path != "/pending" || text.contains("\"request\""))
                            };
                            let found = {
                                let mut left = left.lock().unwrap();
                                let at = left.iter().position(is_lost);
                                at.map(|at| left.remove(at))
                            };
                            if found.is_some() {
                                count.fetch_add(1, SeqCst);
                                return;
                            }
                            asked.clear();
                            near.write_all(&down[..size]).await.unwrap();
                        }
                    }
                }
            });
        }
    });
    (address, dropped)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_on_the_way_is_sent_again_and_asked_once() {
    let broker = Running::start(&json!({}));
    let (port, dropped) = relay(broker.port, &["/pending", "/respond"]).await;
    let host = connect(port, Duration::from_secs(20)).await;
    let handler = Together::new(1);
    let calls = Arc::clone(&handler);
    let serving = tokio::spawn(async move { host.serve(handler).await });
    let guest = broker.enqueue(json!({"type": "single", "prompt": "hi", "depth": 1}));
    assert_eq!(joined(guest).await, (200, json!({"response": "hi none 1"})));
    let until = Instant::now() + Duration::from_secs(10);
    while dropped.load(SeqCst) < 2 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(dropped.load(SeqCst), 2);
    let guest = broker.enqueue(json!({"type": "single", "prompt": "ho", "depth": 1}));
    assert_eq!(joined(guest).await, (200, json!({"response": "ho none 1"})));
    assert_eq!(calls.calls.load(SeqCst), 2);
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_takes_over_answers_what_is_left() {
    let broker = Running::start(&json!({}));
    let host = connect(broker.port, Duration::from_secs(5)).await;
    let stuck = Together::new(2);
    let calls = Arc::clone(&stuck);
    let serving = tokio::spawn(async move { host.serve(stuck).await });
    let guest = broker.enqueue(json!({"type": "single", "prompt": "hi", "depth": 1}));
    while calls.calls.load(SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    let host = connect(broker.port, Duration::from_secs(5)).await;
    let serving = tokio::spawn(async move { host.serve(Together::new(1)).await });
    assert_eq!(joined(guest).await, (200, json!({"response": "hi none 1"})));
    serving.abort();
}

/// Something that isn't a broker: it says this to each poll, but to the first ones, which it lets hang,
/// and counts the polls.
async fn impostor(says: Json, silent: usize) -> (u16, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let polls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&polls);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (says, count) = (says.to_string(), Arc::clone(&count));
            tokio::spawn(async move {
                let mut asked = vec![0; 1 << 16];
                while let Ok(size @ 1..) = stream.read(&mut asked).await {
                    let asked = String::from_utf8_lossy(&asked[..size]).into_owned();
                    if asked.contains("/pending") && count.fetch_add(1, SeqCst) < silent {
                        std::future::pending::<()>().await;
                    }
                    let says = if asked.contains("/pending") { says.as_str() } else { "{}" };
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", says.len());
                    stream.write_all((head + says).as_bytes()).await.unwrap();
                }
            });
        }
    });
    (port, polls)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_under_way_than_allowed_whatever_the_broker_says() {
    let item = |n: usize| {
        let request = json!({"type": "single", "prompt": "hi", "depth": 1}).to_string();
        let id = if n.is_multiple_of(2) { n.to_string() } else { format!("{n} \r\n") };
        json!({"id": id, "timeout": 60, "request": request})
    };
    let items: Vec<Json> = (0..500).map(item).collect();
    let (port, polls) = impostor(json!({"pending": items, "gone": []}), 0).await;
    let options = BrokerOptions { concurrency: 2, ..BrokerOptions::default() };
    let url = format!("http://127.0.0.1:{port}");
    let host = Broker::connect(&url, Secret::new(HOST), options).await.unwrap();
    let stuck = Together::new(1000);
    let calls = Arc::clone(&stuck);
    let serving = tokio::spawn(async move { host.serve(stuck).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(calls.calls.load(SeqCst), 2);
    // Nor is it asked without end what it says at once.
    assert!(polls.load(SeqCst) <= 25, "{} polls", polls.load(SeqCst));
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_without_an_answer_is_tried_again() {
    let request = json!({"type": "single", "prompt": "hi", "depth": 1}).to_string();
    let items = json!([{"id": "a", "timeout": 60, "request": request}]);
    let (port, polls) = impostor(json!({"pending": items, "gone": []}), 1).await;
    let short = Duration::from_millis(300);
    let options = BrokerOptions {
        poll: short,
        timeout: short,
        gone_after: short * 2,
        ..BrokerOptions::default()
    };
    let url = format!("http://127.0.0.1:{port}");
    let host = Broker::connect(&url, Secret::new(HOST), options).await.unwrap();
    let handler = Together::new(1);
    let calls = Arc::clone(&handler);
    let serving = tokio::spawn(async move { host.serve(handler).await });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!serving.is_finished() && calls.calls.load(SeqCst) == 1 && polls.load(SeqCst) > 1);
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_gone_or_refuses_ends_serving() {
    let broker = Running::start(&json!({}));
    let port = broker.port;
    let url = format!("http://127.0.0.1:{port}");
    let wrong = Broker::connect(&url, Secret::new(GUEST), BrokerOptions::default());
    let error = wrong.await.unwrap().serve(Together::new(1)).await;
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    assert!(!error.to_string().contains(GUEST), "{error}");

    let host = connect(port, Duration::from_secs(1)).await;
    let serving = tokio::spawn(async move { host.serve(Together::new(1)).await });
    drop(broker);
    let error = serving.await.unwrap();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("out of reach for 1s"), "{error}");

    for url in
        ["ftp://127.0.0.1", "http://broker.example", "http://192.0.2.1:80", "broker", "https://"]
    {
        let refused = Broker::connect(url, Secret::new(HOST), BrokerOptions::default()).await;
        let error = refused.unwrap_err();
        assert!(error.to_string().starts_with("broker url"), "{url}: {error}");
    }

    let options =
        BrokerOptions { ready_timeout: Duration::from_millis(300), ..BrokerOptions::default() };
    let url = format!("http://127.0.0.1:{port}");
    let error = Broker::connect(&url, Secret::new(HOST), options).await.unwrap_err();
    assert!(error.to_string().contains("wasn't there within 300ms"), "{error}");
}
