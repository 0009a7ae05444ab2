//! What 200 customers complain about, counted with 200 calls of a small model by the RLM loop:
//! `cargo run --release --example aggregate`.
//!
//! Shows what a run may spend (`budget`), and what it did spend, model by model. As in `needle`, the
//! models are played by a server on the loopback that is slow, fails and refuses.

#[path = "../tests/common/chat_server.rs"]
mod chat_server;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chat_server::{ChatOptions, ChatRequest, ChatServer, Reply};
use kaa::lm::{BudgetLimits, ModelRouter, OpenAiHandler, Price, Retries, UpstreamOptions};
use kaa::{Context, EnvironmentOptions, Limits, Rlm, RlmOptions, Runtime, Store, WasmBackend};
use serde_json::json;

/// What the big model says, turn by turn.
const TURNS: [&str; 4] = [
    "```repl\nprint(type(context), len(context))\nprint(*context[:3], sep='\\n')\n```",
    "No keyword tells these apart, so each letter is read.\n```repl
kinds = ('delivery', 'billing', 'quality', 'praise')
task = f'Answer with one word of {kinds}: what is this letter about?\\n'
said = llm_query_batched([task + letter for letter in context])
odd = [i for i, word in enumerate(said) if word not in kinds]
print(f'{len(odd)} of {len(said)} are no such word:', *[said[i] for i in odd[:3]], sep='\\n')\n```",
    "Failed calls and chatty answers: I ask for those again, with more emphasis.\n```repl
again = llm_query_batched(['ONE WORD ONLY. ' + task + context[i] for i in odd])
for i, word in zip(odd, again):
    said[i] = word
print([word for word in said if word not in kinds])\n```",
    "All letters have a kind. Python counts.\n```repl
from collections import Counter
counts = Counter(said)
answer['content'] = ', '.join(f'{kind} {counts[kind]}' for kind in kinds)
answer['ready'] = True\n```",
];

/// What letters say, with what they are about. Only who reads them can tell.
const LETTERS: [(&str, &str); 8] = [
    ("delivery", "I waited at the door for two weeks, and the neighbours have no parcel either."),
    ("billing", "You took the money twice, and my bank says that is for you to sort out."),
    ("quality", "After one wash it had holes in places where nobody should have holes."),
    ("praise", "My mother has not stopped smiling since. Thank you all, again!"),
    ("delivery", "The box came to my old street, although you wrote down the new one."),
    ("quality", "It hums at night, the lid does not close, and it smells of rubber."),
    ("billing", "The discount that you promised is nowhere on the paper that came with it."),
    ("delivery", "Tracking has said 'on its way' since May. It is autumn."),
];

/// The letter of this number, and what it's about.
fn letter(number: usize) -> (&'static str, String) {
    // Some kinds are more frequent than others, in an order that shows no pattern.
    let (kind, text) = LETTERS[number * number % 97 % LETTERS.len()];
    (kind, format!("Letter {number:03}: Dear all, {text} Yours, customer {}", number * 37 % 1_009))
}

/// Both models. The small one has its moods, each depending on the letter.
fn models() -> impl Fn(&ChatRequest) -> Reply {
    let seen = Mutex::new(HashSet::new());
    move |request| {
        let messages = request.body["messages"].as_array().map_or(&[][..], Vec::as_slice);
        if request.body["model"] == "big" {
            let said = messages.iter().filter(|message| message["role"] == "assistant").count();
            return TURNS.get(said).copied().unwrap_or("I have no more to say.").into();
        }
        let prompt = request.prompt();
        let number = prompt.split("Letter ").nth(1).and_then(|rest| rest.get(..3)?.parse().ok());
        let number: usize = number.unwrap_or(0);
        let kind = LETTERS.iter().find(|(_, text)| prompt.contains(text));
        let kind = kind.map_or("I see no letter.", |(kind, _)| kind);
        let is_strict = prompt.starts_with("ONE WORD ONLY.");
        match (number % 40, seen.lock().unwrap().insert(prompt.to_owned())) {
            (7 | 23, true) => Reply::error(500, "internal error"),
            (13, true) => Reply::Reset,
            (29, true) => Reply::HalfBody,
            (31, _) if !is_strict => Reply::error(400, "the prompt was filtered"),
            (37, _) if !is_strict => format!("This letter is about {kind}, I think.").into(),
            _ => kind.into(),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory: set HOME")?;
    let runtime = Arc::new(Runtime::open(Store::open(cache.join("kaa"))?)?);
    let image = runtime.image("base", &|_| {})?;

    let weather = ChatOptions {
        latency: Duration::from_millis(80),
        jitter: Duration::from_millis(80),
        in_flight_max: Some(40),
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
    let router = ModelRouter::builder()
        .model("big", model("big", Price { input: 1.25, output: 10.0 })?)
        .model("small", model("small", Price { input: 0.05, output: 0.4 })?)
        .default_from_depth(1, "small")
        .build()?;

    // A cell may have 48 calls in flight; the run ends when it has cost half a dollar or 1,000 calls.
    let limits = Limits { lm_concurrency: 48, ..Limits::default() };
    let options = RlmOptions {
        environment: EnvironmentOptions { limits, ..Default::default() },
        budget: BudgetLimits { cost: 0.5, calls: 1_000, ..Default::default() },
        ..RlmOptions::default()
    };
    let rlm = Rlm::new(Arc::new(WasmBackend::new(runtime, image)), Arc::new(router), options)?;
    let letters: Vec<String> = (0..200).map(|number| letter(number).1).collect();
    let context = Context::Json(json!(letters).to_string().into_bytes());
    let question = "What do these customers write about, and how many about each?";
    let done = rlm.complete(context, Some(question)).await?;

    println!("answer: {}", done.response);
    println!("{} turns, {} cells in {:.1?}", done.turns, done.cells, done.execution_time);
    for usage in done.usage.models() {
        println!(
            "{:>6}: {} answers, {} tokens in, {} out, ${:.6}",
            usage.model,
            usage.calls,
            usage.input_tokens,
            usage.output_tokens,
            usage.cost.unwrap_or_default()
        );
    }
    let asked = server.counts();
    println!(
        "the server saw {} requests, refused {} with 429, and had at most {} at once",
        asked.requests, asked.rate_limited, asked.in_flight_max
    );
    let count = |wanted| (0..200).filter(|number| letter(*number).0 == wanted).count();
    let kinds = ["delivery", "billing", "quality", "praise"];
    let expected: Vec<_> = kinds.map(|kind| format!("{kind} {}", count(kind))).into();
    assert_eq!(done.response, expected.join(", "));
    // Each letter has an answer, five of them two: the first was too long.
    assert_eq!(done.usage.calls(), 4 + 200 + 5);
    assert!(asked.requests > 209 && asked.in_flight == 0);
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
