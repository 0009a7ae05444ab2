//! A needle in 50 MB of text, found by the RLM loop: `cargo run --release --example needle`.
//!
//! The models are played by a server on the loopback that has the bad days of a real one: answers take
//! their time, some requests fail or are reset, and whoever asks too much at once gets 429. To ask real
//! ones, give [`OpenAiHandler`] a key, and leave out the `base_url` or name your own.

#[path = "../tests/common/chat_server.rs"]
mod chat_server;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chat_server::{ChatOptions, ChatRequest, ChatServer, Reply};
use kaa::lm::{ModelRouter, OpenAiHandler, Price, Retries, UpstreamOptions};
use kaa::{Context, Rlm, RlmEvent, RlmObserver, RlmOptions, RlmProgress};
use kaa::{Runtime, Store, WasmBackend};

/// What the big model says, turn by turn.
const TURNS: [&str; 5] = [
    "I look at the context first.\n```repl\nprint(len(context))\nprint(context[:300])\n```",
    "One note per line. Python finds those about the key.\n```repl
hits, at = [], context.find('brass key')
while at >= 0:
    start, end = context.rfind('\\n', 0, at) + 1, context.find('\\n', at)
    hits.append(context[start:end])
    at = context.find('brass key', end)
print(f'{len(hits)} notes, such as', *hits[:2], sep='\\n')\n```",
    "Whether a note says where the key is has to be understood.\n```repl
task = 'Does the writer say where the brass key was put? Answer with the place, or NO.\\n'
places = llm_query_batched([task + hit for hit in hits])
failed = [i for i, place in enumerate(places) if place.startswith('Error:')]
print(f'{len(failed)} calls failed:', *[places[i] for i in failed], sep='\\n')\n```",
    "I ask once more for those that failed.\n```repl
again = llm_query_batched(['Second attempt. ' + task + hits[i] for i in failed])
for i, place in zip(failed, again):
    places[i] = place
found = [(hit, place) for hit, place in zip(hits, places) if place != 'NO']
print(*found, sep='\\n')\n```",
    "The last of these notes counts.\n```repl
answer['content'] = found[-1][1]\nanswer['ready'] = True\n```",
];

/// Notes of which a few mention the key, and of those again a few say where it was put.
fn notes() -> String {
    let mut text = String::with_capacity(51 << 20);
    for n in 0..480_000 {
        let what = match (n % 8_000 == 17, n / 8_000) {
            (true, 12) => "I put the brass key behind the barometer, nobody looks there".into(),
            (true, 31) => "to be safe I put the brass key into the blue vase of the hall".into(),
            (true, 47) => "the vase is sold: I put the brass key under the old globe".into(),
            (true, _) => format!("has anybody seen the brass key of room {}?", n % 29),
            _ => format!("box {} went to shelf {}, row {}", n * 7 % 9_973, n % 613, n % 17),
        };
        let (from, to) = (["Ada", "Ben", "Cleo"][n % 3], ["Dora", "Emil"][n % 2]);
        text += &format!("[note {n:06}] {from} to {to}: {what:<66} (filed, checked)\n");
    }
    text
}

/// Both models. The small one fails for some notes when it's asked for the first time.
fn models() -> impl Fn(&ChatRequest) -> Reply {
    let seen = Mutex::new(HashSet::new());
    move |request| {
        let messages = request.body["messages"].as_array().map_or(&[][..], Vec::as_slice);
        if request.body["model"] == "big" {
            let said = messages.iter().filter(|message| message["role"] == "assistant").count();
            return TURNS.get(said).copied().unwrap_or("I have no more to say.").into();
        }
        let prompt = request.prompt();
        let number = prompt.split("[note ").nth(1).and_then(|rest| rest.get(..6)?.parse().ok());
        let hit: u32 = number.unwrap_or(0) / 8_000;
        let is_first = seen.lock().unwrap().insert(prompt.to_owned());
        match prompt.split_once("I put the brass key ") {
            _ if hit % 20 == 9 && !prompt.starts_with("Second attempt.") => {
                Reply::error(400, "the prompt was filtered; word it differently")
            }
            _ if hit % 7 == 3 && is_first => Reply::error(503, "overloaded"),
            _ if hit % 11 == 5 && is_first => Reply::Reset,
            Some((_, place)) => place.split([',', '(']).next().unwrap_or(place).trim().into(),
            None => "NO".into(),
        }
    }
}

/// Tells what happens, and keeps how far the run is.
#[derive(Default)]
struct Narrator(Mutex<RlmProgress>);

impl RlmObserver for Narrator {
    fn event(&self, event: RlmEvent<'_>, progress: &RlmProgress) {
        *self.0.lock().unwrap() = *progress;
        match event {
            RlmEvent::TurnBegan { turn, .. } => println!("turn {turn}"),
            RlmEvent::Responded { response, .. } => {
                println!("  {}", response.lines().next().unwrap_or_default());
            }
            RlmEvent::CallsBegan { count, .. } => println!("  {count} prompts at once"),
            RlmEvent::CellEnded { execution, .. } => {
                execution.stdout.text().lines().for_each(|line| println!("  | {line}"));
            }
            _ => {}
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory: set HOME")?;
    let runtime = Arc::new(Runtime::open(Store::open(cache.join("kaa"))?)?);
    let image = runtime.image("base", &|_| {})?;

    let weather = ChatOptions {
        latency: Duration::from_millis(60),
        jitter: Duration::from_millis(60),
        in_flight_max: Some(24),
        retry_after: Some("1".into()),
        ..ChatOptions::default()
    };
    let server = ChatServer::start(weather, models());
    let model = |name: &str, price| {
        let retries = Retries { base: Duration::from_millis(100), ..Retries::default() };
        let base_url = Some(server.openai_url());
        let options =
            UpstreamOptions { base_url, price: Some(price), retries, ..Default::default() };
        OpenAiHandler::new(name, options).map(Arc::new)
    };
    // The loop itself has depth 0; what its cells ask has depth 1.
    let router = ModelRouter::builder()
        .model("big", model("big", Price { input: 1.25, output: 10.0 })?)
        .model("small", model("small", Price { input: 0.05, output: 0.4 })?)
        .default_from_depth(1, "small")
        .build()?;

    let narrator = Arc::new(Narrator::default());
    let options = RlmOptions { observer: Some(Arc::clone(&narrator) as _), ..Default::default() };
    let rlm = Rlm::new(Arc::new(WasmBackend::new(runtime, image)), Arc::new(router), options)?;
    let context = Context::Text(notes().into_bytes());
    let done = rlm.complete(context, Some("Where is the brass key now?")).await?;

    let (calls, asked) = (narrator.0.lock().unwrap().calls, server.counts());
    println!("answer: {}", done.response);
    println!(
        "{} turns, {} cells, {calls} calls in {:.1?}; ${:.6}",
        done.turns,
        done.cells,
        done.execution_time,
        done.usage.cost().unwrap_or_default()
    );
    println!(
        "the server saw {} requests ({} retries, {} of them after 429), at most {} at once",
        asked.requests,
        asked.requests - calls,
        asked.rate_limited,
        asked.in_flight_max
    );
    assert_eq!(done.response, "under the old globe");
    assert_eq!((done.turns, calls), (5, 5 + 60 + 3), "turns, notes, second attempts");
    assert!(asked.requests > calls && asked.in_flight == 0);
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
