//! An exported function writes what the op of its name writes, bit for bit.

use std::collections::BTreeSet;
use std::ptr;

use super::call::Raw;
use super::cases::{Views, cases, last_error};
use super::header;
use super::lab::{Arg, Lab};
use crate::status::{PIXMIM_OK, PIXMIM_WORKSPACE};
use crate::tensor::pixmim_tensor;

#[test]
fn every_function_of_the_header_has_a_case_with_its_arguments() {
    let labs = Lab::all();
    let functions = header::functions();
    for lab in &labs {
        for case in cases(lab) {
            let of = functions.iter().find(|function| function.name == case.function);
            let of = of.unwrap_or_else(|| panic!("{} is not in the header", case.function));
            let declared: Vec<_> = of.params.iter().map(|param| param.name.as_str()).collect();
            let given: Vec<_> = case.args.iter().map(|(name, _)| *name).collect();
            assert_eq!(declared, given, "{}", of.name);
        }
    }
    let cases = cases(&labs[0]);
    let covered: BTreeSet<_> = cases.iter().map(|case| case.function).collect();
    let declared: BTreeSet<_> = functions.iter().map(|function| function.name.as_str()).collect();
    assert_eq!(declared, covered);
}

#[test]
fn an_exported_function_writes_the_bits_of_the_op() {
    for lab in &Lab::all() {
        for (mut ours, mut direct) in cases(lab).into_iter().zip(cases(lab)) {
            let name = format!("{} on {:?} in {:?}", ours.function, lab.dev, lab.real);
            let Some(op) = ours.op else {
                assert_eq!(ours.call(&ours.raws()), PIXMIM_OK, "{name}: {}", last_error());
                continue;
            };
            for case in [&mut ours, &mut direct] {
                case.size_workspace(lab, &case.raws());
            }
            let before: Vec<_> =
                ours.args.iter().map(|(_, arg)| arg.memory().map(|m| m.bytes(&lab.dev))).collect();
            assert_eq!(ours.call(&ours.raws()), PIXMIM_OK, "{name}: {}", last_error());
            op(Views { dev: &lab.dev, case: &direct, lab }).unwrap();
            let mut changed = false;
            for (at, (arg, _)) in
                ours.args.iter().enumerate().filter(|(_, (n, _))| *n != "workspace")
            {
                let [ours, direct] = [&ours, &direct].map(|case| case.args[at].1.memory());
                let (Some(ours), Some(direct)) = (ours, direct) else { continue };
                ours.expect_guards(&name);
                let (ours, direct) = (ours.bytes(&lab.dev), direct.bytes(&lab.dev));
                assert!(ours == direct, "{name}: other bits in `{arg}`");
                changed |= before[at].as_ref() != Some(&ours);
            }
            assert!(changed, "{name} wrote nothing");
        }
    }
}

#[test]
fn a_workspace_is_asked_for_without_data_and_a_smaller_one_is_refused() {
    let mut refused = 0;
    for lab in &Lab::all() {
        for mut case in cases(lab) {
            // As the caller has not allocated yet.
            let tensors: Vec<Option<Box<pixmim_tensor>>> = case
                .args
                .iter()
                .map(|(_, arg)| match arg {
                    Arg::Tensor(memory) => {
                        Some(Box::new(pixmim_tensor { data: ptr::null_mut(), ..*memory.tensor }))
                    }
                    _ => None,
                })
                .collect();
            let mut args = case.raws();
            for (raw, tensor) in args.iter_mut().zip(&tensors) {
                if let Some(tensor) = tensor {
                    *raw = Raw::address(&raw const **tensor);
                }
            }
            case.size_workspace(lab, &args);
            let Some(at) = case.args.iter().position(|(name, _)| *name == "workspace_bytes") else {
                continue;
            };
            let Arg::Block(bytes) = &case.args[at].1 else { panic!("a place") };
            let needed = bytes[0];
            // With data it says the same.
            let mut args = case.raws();
            args[at - 1] = Raw::Word(0);
            assert_eq!(case.call(&args), PIXMIM_OK, "{}", last_error());
            assert_eq!(bytes[0], needed);
            // What is asked for is rounded up to 256 bytes, from at least one.
            for less in [0, needed.saturating_sub(256)] {
                let place = [less];
                let mut args = case.raws();
                args[at] = Raw::address(place.as_ptr());
                let status = case.call(&args);
                assert!(status == PIXMIM_WORKSPACE || status == PIXMIM_OK, "{}", last_error());
                if status == PIXMIM_WORKSPACE {
                    refused += 1;
                    assert!(last_error().contains("`workspace`"), "{}", last_error());
                }
            }
        }
    }
    assert!(refused > 60, "only {refused} workspaces were refused");
}
