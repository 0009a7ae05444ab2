//! One session: `cargo run --release --example one_session`.

use kaa::{EnvironmentExt, EnvironmentOptions, Runtime, Store};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory: set HOME")?;
    let runtime = Runtime::open(Store::open(cache.join("kaa"))?)?;
    let image = runtime.image("base", &|_| {})?;
    let mut session = runtime.environment(&image, EnvironmentOptions::default())?;
    session.execute("squares = [n * n for n in range(10)]").await?;
    let cell = session.execute("print(sum(squares))").await?;
    println!("{:?}: {}", cell.outcome, cell.stdout.text().trim());
    assert_eq!(cell.stdout.text(), "285\n");
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
