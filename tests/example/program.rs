//! Where the built example is.

use std::path::{Path, PathBuf};

/// The example that cargo builds beside this test.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program =
        profile.join("examples").join(format!("pretrain_vit{}", std::env::consts::EXE_SUFFIX));
    assert!(
        program.is_file(),
        "{} is missing; `cargo build --release --example pretrain_vit` builds it",
        program.display()
    );
    program
}
