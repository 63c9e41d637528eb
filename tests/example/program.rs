//! Where the built examples are.

use std::path::{Path, PathBuf};

/// `pretrain_vit`.
pub(crate) fn program() -> PathBuf {
    example("pretrain_vit")
}

/// An example that cargo builds beside this test.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        program.is_file(),
        "{} is missing; `cargo build --release --example {name}` builds it",
        program.display()
    );
    program
}
