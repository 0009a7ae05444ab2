//! Cells of a session, timed one after the other.

use std::time::Instant;

use kaa::benchmark::Figure;
use kaa::{Environment, EnvironmentExt, Outcome};

/// The median of so many runs of a cell, in milliseconds. It must complete.
pub(crate) async fn milliseconds(
    session: &mut Box<dyn Environment>,
    code: &str,
    rounds: usize,
) -> f64 {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let since = Instant::now();
        let execution = session.execute(code).await.unwrap();
        times.push(since.elapsed().as_secs_f64() * 1000.0);
        assert_eq!(execution.outcome, Outcome::Completed, "{}", execution.stderr.text());
    }
    Figure::of(&times).expect("there is a round").median
}
