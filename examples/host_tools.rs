//! Host functions that cells call: `cargo run --release --example host_tools`.
//!
//! One answers at once, one waits without holding a thread, and what goes wrong in one is an exception
//! in the cell.

use std::time::Duration;

use kaa::{EnvironmentExt, EnvironmentOptions, Limits, Runtime, Store, Tool, ToolError, Value};

fn tools() -> Vec<Tool> {
    let stock = Tool::new("stock", |call| match call.args.as_slice() {
        [Value::Str(item)] if item == "apples" => Ok(Value::Int(12)),
        [Value::Str(item)] => Err(ToolError::of_type("KeyError", format!("no {item} here"))),
        _ => Err(ToolError::of_type("TypeError", "stock(item) takes one text")),
    });
    let order = Tool::new_async("order", |call| async move {
        // A database or another service would be asked here; the guest's compute time stands still.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let count = call.kwargs.iter().find(|(name, _)| name == "count");
        match count {
            Some((_, Value::Int(count))) => Ok(Value::Str(format!("ordered {count}"))),
            _ => Err(ToolError::of_type("TypeError", "order(item, count=...) wants a number")),
        }
    });
    vec![stock, order]
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory: set HOME")?;
    let runtime = Runtime::open(Store::open(cache.join("kaa"))?)?;
    let image = runtime.image("base", &|_| {})?;
    let limits = Limits { tool_calls: 10, ..Limits::default() };
    let options = EnvironmentOptions { tools: tools(), limits, ..EnvironmentOptions::default() };
    let mut session = runtime.environment(&image, options)?;
    let code = "
for item in ('apples', 'pears'):
    try:
        have = stock(item)
    except KeyError as error:
        print(item, 'failed:', error)
    else:
        print(item, have, order(item, count=20 - have))
";
    let cell = session.execute(code).await?;
    print!("{}", cell.stdout.text());
    println!("{} calls, {:.0?} waited", cell.usage.tool_calls, cell.usage.host_wait);
    assert_eq!(cell.stdout.text(), "apples 12 ordered 8\npears failed: 'no pears here'\n");
    Ok(())
}

#[test]
fn runs() {
    main().unwrap();
}
