//! Sessions in sandboxes over a long line: how many round trips things take. The line is emulated: the
//! stand-in of Modal delays every byte, in both directions, by half of it.
//!
//! `cargo bench --bench modal [-- MILLISECONDS]`, 80 by default.

#[path = "common/cells.rs"]
mod cells;
#[path = "../tests/common/modal.rs"]
mod cloud;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cloud::{StandIn, StandInOptions};
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest};
use kaa::modal::{Carrier, ModalBackend, ModalOptions};
use kaa::{Backend, Context, EnvironmentExt, EnvironmentOptions, Limits};

const CONTEXT_BYTES: usize = 100_000_000;
const ROUNDS: usize = 20;

/// Answers after as long as the prompt says, in milliseconds.
struct Slow;

#[async_trait]
impl LmHandler for Slow {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let millis = request.prompt.to_text().parse().unwrap_or(0);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        Ok(LmCompletion { response: "yes".into(), ..LmCompletion::default() })
    }
}

#[tokio::main]
async fn main() {
    let millis: u64 = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(80);
    let round_trip = Duration::from_millis(millis);
    let options = StandInOptions { round_trip, ..StandInOptions::default() };
    let stand_in = StandIn::start(options).await;
    for carrier in [Carrier::Stdio, Carrier::Broker { port: 8080 }] {
        measure(&stand_in, carrier, millis).await;
    }
}

async fn measure(stand_in: &StandIn, carrier: Carrier, millis: u64) {
    let since = Instant::now();
    let options = ModalOptions { carrier, ..ModalOptions::default() };
    let backend = ModalBackend::connect(stand_in.config(), options, &|_| {}).await.unwrap();
    let connected = since.elapsed();
    let limits = Limits { lm_calls: u32::MAX, memory_bytes: 2 << 30, ..Limits::default() };
    let options =
        EnvironmentOptions { limits, lm: Some(Arc::new(Slow)), ..EnvironmentOptions::default() };
    // The first session compiles the agent for all.
    backend.open(options.clone()).await.unwrap().close().await.unwrap();
    let since = Instant::now();
    let mut session = backend.open(options).await.unwrap();
    let opened = since.elapsed();
    let trips = |ms: f64| ms / millis.max(1) as f64;
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    println!(
        "{carrier:?}, line: {millis} ms; connect: {:.1} trips; open: {:.1} trips",
        trips(ms(connected)),
        trips(ms(opened))
    );

    let cell = cells::milliseconds(&mut session, "x = 1", ROUNDS).await;
    let ten = cells::milliseconds(&mut session, "for _ in range(10): llm_query('0')", 5).await;
    let call = (ten - cell) / 10.0;
    println!(
        "cell: {cell:.1} ms, {:.2} trips; llm_query: {call:.1} ms, {:.2} trips",
        trips(cell),
        trips(call)
    );
    let four = "from concurrent.futures import ThreadPoolExecutor as Pool\n\
                with Pool(4) as pool: list(pool.map(llm_query, ['500'] * 4))";
    let four = cells::milliseconds(&mut session, four, 3).await - cell;
    println!("four llm_query of 500 ms in parallel: {four:.0} ms");
    let text = Context::Text(vec![b'a'; CONTEXT_BYTES]);
    let since = Instant::now();
    session.add_context(text, None).await.unwrap();
    println!("context of 100 MB: {:.2} s", since.elapsed().as_secs_f64());
    let length = session.execute("print(len(context))").await.unwrap();
    assert_eq!(length.stdout.text(), format!("{CONTEXT_BYTES}\n"));
    session.close().await.unwrap();
}
