//! `include/pixmim.h` is what cbindgen makes of the sources.

use std::fs;
use std::path::Path;

#[test]
fn the_header_is_that_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut header = Vec::new();
    cbindgen::generate_with_config(root, config).unwrap().write(&mut header);
    let (header, path) = (String::from_utf8(header).unwrap(), root.join("include/pixmim.h"));
    if std::env::var_os("PIXMIM_BLESS").is_some() {
        fs::write(&path, &header).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == header,
        "{} is old: PIXMIM_BLESS=1 cargo test --release -p pixmim-capi --test header",
        path.display()
    );
}
