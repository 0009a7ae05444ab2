//! The figures that the README shows are those of a run, with nothing done to them.

use std::fs;
use std::path::Path;

use kaa::benchmark::Report;

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_tables_and_the_picture_are_those_of_the_report() {
    let report = Report::from_json(&read("benches/isolation.json")).unwrap();
    assert!(report.is_release, "figures of a build that isn't made for speed");
    let readme = read("README.md");
    let (_, rest) = readme.split_once("<!-- kaa bench isolation -->\n\n").expect("a mark");
    let (tables, _) = rest.split_once("\n<!-- /kaa bench isolation -->").expect("a mark");
    let help = "write them anew: kaa bench isolation --from benches/isolation.json --markdown README.md \
                --plot benches/isolation.svg";
    assert!(tables == report.markdown(), "README.md has other tables; {help}");
    assert!(read("benches/isolation.svg") == report.plot().unwrap(), "another picture; {help}");
}
