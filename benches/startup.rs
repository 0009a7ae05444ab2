//! Whole processes, side by side: `kaa run -c 'print(1+1)'` with a warm cache and native `python3`.
//!
//! `cargo bench --bench startup [-- ROUNDS]`. Medians of interleaved runs.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn time(command: &mut Command) -> Duration {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().expect("it can be started");
    let elapsed = start.elapsed();
    assert_eq!(output.stdout, b"2\n", "{}", String::from_utf8_lossy(&output.stderr));
    elapsed
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn main() {
    let rounds: usize = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(40);
    let kaa = || time(Command::new(env!("CARGO_BIN_EXE_kaa")).args(["run", "-c", "print(1+1)"]));
    let sci = || {
        let args = ["run", "--image", "sci", "-c", "print(1+1)"];
        time(Command::new(env!("CARGO_BIN_EXE_kaa")).args(args))
    };
    // The interpreter itself: `python3` may be a script that looks for it.
    let asked = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let python = String::from_utf8(asked.expect("python3 runs").stdout).expect("a path in UTF-8");
    let python = || time(Command::new(python.trim()).args(["-c", "print(1+1)"]));
    kaa();
    sci();
    python();
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        times[0].push(kaa());
        times[1].push(sci());
        times[2].push(python());
    }
    let [kaa, sci, python] = times.each_mut().map(|times| median(times));
    println!(
        "kaa run -c 'print(1+1)': {kaa:.1} ms; with --image sci: {sci:.1} ms; python3 -c: {python:.1} ms"
    );
}
