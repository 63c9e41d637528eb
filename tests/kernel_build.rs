//! What nvcc made of the kernels: the registers and shared memory on record, and no spills where they would cost.
//!
//! `compiled` is there when nvcc was, `not_compiled` when it was not: the list of tests says which ran.

#[path = "../build/ptxas.rs"]
mod ptxas;

use pixmim::cuda::kernels::{FATBINS, KERNELS, RESOURCES};

#[test]
fn the_report_of_ptxas_is_read() {
    let report = include_str!("fixtures/ptxas.txt");
    let found: Vec<_> = ptxas::parse(report).iter().map(ToString::to_string).collect();
    // Functions that were not inlined count with the kernel above them.
    let wanted =
        "two_functions sm_80 32 456 640 0 552, small sm_80 14 0 0 64 0, small sm_90a 16 0 0 64 0";
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(found.iter().map(|line| words(line)).collect::<Vec<_>>().join(", "), wanted);
    let warnings: Vec<_> = ptxas::warnings(report).collect();
    assert_eq!(warnings.len(), 5, "{warnings:?}");
}

#[test]
fn every_kernel_has_one_name_and_a_file() {
    for (at, kernel) in KERNELS.iter().enumerate() {
        assert!(KERNELS[..at].iter().all(|other| other.name != kernel.name), "{kernel:?}");
        assert!(kernel.file.starts_with("kernels/") && kernel.file.ends_with(".cu"), "{kernel:?}");
    }
}

#[cfg(not(pixmim_nvcc))]
mod not_compiled {
    use super::*;

    #[test]
    fn nothing_is_embedded_and_nothing_was_demanded() {
        assert!(FATBINS.is_empty() && RESOURCES.is_empty());
        let demanded = std::env::var("PIXMIM_REQUIRE_CUDA").is_ok_and(|value| value != "0");
        assert!(!(demanded && cfg!(feature = "cuda")), "built without nvcc all the same");
    }
}

#[cfg(pixmim_nvcc)]
mod compiled {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    /// The lines of a table, by kernel and architecture.
    fn rows(table: &str) -> BTreeMap<(&str, &str), Vec<&str>> {
        let rows = table.lines().filter(|line| !line.starts_with('#'));
        let rows = rows.map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| !row.is_empty())
            .map(|row| ((row[0], row[1]), row[2..].to_vec()))
            .collect()
    }

    /// `release 13.0, V13.0.88`.
    fn nvcc(table: &str) -> &str {
        table.split("by nvcc ").nth(1).and_then(|rest| rest.split(':').next()).unwrap_or("none")
    }

    #[test]
    fn every_file_of_kernels_is_embedded() {
        for kernel in KERNELS {
            let stem = Path::new(kernel.file).file_stem().and_then(|stem| stem.to_str());
            let fatbin = FATBINS.iter().find(|(name, _)| Some(*name) == stem);
            let (_, fatbin) = fatbin.unwrap_or_else(|| panic!("{} is not embedded", kernel.file));
            // The magic number of a fatbin, and an address as the driver wants it.
            assert_eq!(fatbin[..4], [0x50, 0xed, 0x55, 0xba], "{}", kernel.file);
            assert_eq!(fatbin.as_ptr() as usize % 16, 0, "{}", kernel.file);
        }
    }

    #[test]
    fn hot_kernels_spill_no_registers() {
        let rows = rows(RESOURCES);
        let mut spills = Vec::new();
        for kernel in KERNELS.iter().filter(|kernel| kernel.hot) {
            let archs: Vec<_> = rows.iter().filter(|((name, _), _)| *name == kernel.name).collect();
            assert!(!archs.is_empty(), "{} was not compiled", kernel.name);
            for ((name, arch), row) in archs {
                if row[1..3] != ["0", "0"] {
                    spills
                        .push(format!("{name} {arch}: stores {}, loads {} bytes", row[1], row[2]));
                }
            }
        }
        assert!(spills.is_empty(), "hot kernels that spill registers:\n{}", spills.join("\n"));
    }

    #[test]
    fn registers_and_shared_memory_are_those_on_record() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/resources.txt");
        if std::env::var_os("PIXMIM_BLESS").is_some() {
            assert!(std::env::var_os("PIXMIM_CUDA_ARCHS").is_none(), "bless all architectures");
            std::fs::write(&path, RESOURCES).unwrap();
        }
        let recorded = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            nvcc(RESOURCES),
            nvcc(&recorded),
            "built by another nvcc (left) than kernels/resources.txt (right): run scripts/get-nvcc and set PIXMIM_NVCC \
             to target/cuda/nvidia/cu13/bin/nvcc"
        );
        let (built, recorded) = (rows(RESOURCES), rows(&recorded));
        let is_built = |arch: &str| built.keys().any(|(_, other)| *other == arch);
        let columns = ["registers", "spill stores", "spill loads", "shared", "stack", "kind"];
        let mut changes = Vec::new();
        for ((name, arch), now) in &built {
            match recorded.get(&(name, arch)) {
                None => changes.push(format!("{name} {arch}: is new, {}", now.join(" "))),
                Some(before) => {
                    let pairs = columns.iter().zip(before.iter().zip(now));
                    for (column, (before, now)) in pairs.filter(|(_, (before, now))| before != now)
                    {
                        changes.push(format!("{name} {arch}: {column} {before} -> {now}"));
                    }
                }
            }
        }
        // PIXMIM_CUDA_ARCHS leaves some out, which is no change.
        let gone = recorded.keys().filter(|key| !built.contains_key(*key));
        let gone = gone.filter(|(name, arch)| {
            is_built(arch) || !KERNELS.iter().any(|kernel| kernel.name == *name)
        });
        changes.extend(gone.map(|(name, arch)| format!("{name} {arch}: is gone")));
        assert!(
            changes.is_empty(),
            "unexplained change of registers or shared memory; if it is meant, PIXMIM_BLESS=1:\n{}",
            changes.join("\n")
        );
        let demanded = std::env::var("PIXMIM_REQUIRE_CUDA").is_ok_and(|value| value != "0");
        assert!(
            !demanded || recorded.keys().all(|key| built.contains_key(key)),
            "PIXMIM_CUDA_ARCHS left out architectures that PIXMIM_REQUIRE_CUDA demands"
        );
    }
}
