//! Tenants that share a process: `cargo run --release --example many_tenants`.
//!
//! One tenant spins in as many sessions as it may have. Another goes on working; afterwards the report
//! says who took what.

use std::time::{Duration, Instant};

use kaa::{Environment, EnvironmentExt, EnvironmentOptions, Error, Quotas, Runtime, Store};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory: set HOME")?;
    let runtime = Runtime::open(Store::open(cache.join("kaa"))?)?;
    let image = runtime.image("base", &|_| {})?;
    let quotas = Quotas { sessions: 20, memory_bytes: 256 << 20, ..Quotas::default() };
    let greedy = runtime.tenant("greedy", quotas)?;
    let modest = runtime.tenant("modest", Quotas::default())?;
    let options = |tenant: &kaa::Tenant| EnvironmentOptions {
        tenant: Some(tenant.clone()),
        ..EnvironmentOptions::default()
    };

    let mut spinning = Vec::new();
    let refused = loop {
        match runtime.environment(&image, options(&greedy)) {
            Ok(mut session) => {
                let stop = session.interrupt();
                let code = "while True: pass";
                let cell = tokio::spawn(async move { session.execute(code).await });
                spinning.push((stop, cell));
            }
            Err(error @ Error::Quota { .. }) => break error,
            Err(error) => return Err(error.into()),
        }
    };
    println!("{refused}");

    let mut session = runtime.environment(&image, options(&modest))?;
    session.execute("n = 0").await?;
    let started = Instant::now();
    for _ in 0..100 {
        session.execute("n += 1").await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("100 cells of the other tenant, a millisecond apart: {:.1?}", started.elapsed());

    for (stop, cell) in spinning {
        // Aborting the task would do as well: whatever way a cell ends, everything is given back.
        stop.interrupt();
        let execution = cell.await??;
        assert!(execution.exception.is_some());
    }
    for usage in runtime.usage() {
        println!(
            "{:>8}: {} cells, {:.1?} computed, {:.1?} delayed, {} sessions left",
            usage.name, usage.cells, usage.compute, usage.delayed, usage.sessions
        );
    }
    assert_eq!(greedy.usage().sessions, 0);
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
