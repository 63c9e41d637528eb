//! Matrix products through cublasLt: one plan for each kind of product, made when it is first seen and kept.
//!
//! A plan pins the algorithm, so that every step of a run, and of the run that goes on from it, gives the same bits.
//! Algorithms that are not deterministic are never chosen. By default it is the one that cublasLt thinks best, which is the
//! same in every run on the same GPU, driver and version. With `PIXMIM_MATMUL=timed` it is the fastest of those offered:
//! some products gain, the first step takes longer, and since times of near equals vary, two runs may differ in their
//! last bits.

mod descriptors;
mod export;
mod problem;
mod timing;

use std::collections::HashMap;

use self::descriptors::{Addresses, Algorithm, Handle, Product, arithmetics};
use self::export::Pinned;
use self::problem::{Add, Problem};
use crate::cuda::driver::Matmul;
use crate::cuda::nvidia::{Memory, Stream};
use crate::cuda::probe::{Found, Gpu};
use crate::{Error, Result};

/// Every function of libcublasLt called below this module.
pub(super) const SYMBOLS: [&str; 15] = descriptors::SYMBOLS;

/// What NVIDIA recommends for Hopper. All products go to one stream, so one is enough.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The plans of a stream.
#[derive(Debug)]
pub(super) struct Plans {
    /// What the chosen algorithms hold for.
    identity: String,
    /// Whether to time the algorithms; else the first is taken.
    timed: bool,
    plans: HashMap<Problem, Plan>,
    /// Chosen by an earlier run.
    imported: Pinned,
    workspace: Memory,
    handle: Handle,
}

#[derive(Debug)]
struct Plan {
    product: Product,
    algorithm: Algorithm,
}

impl Plans {
    /// For a GPU whose context is current.
    pub(super) fn new(gpu: &Gpu, found: &Found) -> Result<Self> {
        let timed = match std::env::var("PIXMIM_MATMUL") {
            Err(_) => false,
            Ok(value) if value == "timed" => true,
            Ok(value) => {
                let why = format!(
                    "is `{value}`; `timed` takes the fastest algorithm, unset it for cublasLt's first"
                );
                return Err(Error::invalid("PIXMIM_MATMUL", why));
            }
        };
        let (name, driver, version) = (&gpu.name, found.driver, found.cublaslt.version);
        Ok(Self {
            identity: format!("{name}, driver {driver}, cublasLt {version}"),
            timed,
            plans: HashMap::new(),
            imported: Pinned::new(),
            workspace: Memory::new(WORKSPACE_BYTES, "the workspace of cublasLt")?,
            handle: Handle::new()?,
        })
    }

    /// Enqueues a product.
    pub(super) fn run(&mut self, matmul: &Matmul, stream: &Stream) -> Result<()> {
        let problem = Problem::new(matmul)?;
        if !self.plans.contains_key(&problem) {
            let plan = self.plan(&problem, stream)?;
            self.plans.insert(problem, plan);
        }
        let Plan { product, algorithm } = &self.plans[&problem];
        let addresses = Addresses {
            a: matmul.b.ptr.0,
            b: matmul.a.ptr.0,
            c: matmul.add.unwrap_or(matmul.out.ptr).0,
            d: matmul.out.ptr.0,
            bias: matmul.bias.map_or(0, |bias| bias.0),
        };
        self.multiply(&problem, product, algorithm, addresses, stream)
    }

    fn multiply(
        &self,
        problem: &Problem,
        product: &Product,
        algorithm: &Algorithm,
        addresses: Addresses,
        stream: &Stream,
    ) -> Result<()> {
        let beta = if problem.add() == Add::Nothing { 0.0 } else { 1.0 };
        self.handle.multiply(product, algorithm, addresses, beta, &self.workspace, stream).map_err(
            |error| match error {
                Error::Gpu { action, why } => {
                    Error::Gpu { action, why: format!("{problem}: {why}") }
                }
                error => error,
            },
        )
    }

    fn plan(&self, problem: &Problem, stream: &Stream) -> Result<Plan> {
        if stream.is_capturing()? {
            let why =
                format!("{problem} was not seen before recording began; run the step once before");
            return Err(Error::Gpu { action: "plan a product", why });
        }
        // cublasLt wants an address with the bias while planning, and does not use it.
        let bias = self.workspace.address();
        if let Some(algorithm) = self.imported.get(problem) {
            let product = Product::new(problem, algorithm.arithmetic as usize, bias)?;
            if self.handle.accepts(&product, algorithm) {
                return Ok(Plan { product, algorithm: *algorithm });
            }
        }
        for arithmetic in 0..arithmetics(problem.factors()).len() {
            let product = Product::new(problem, arithmetic, bias)?;
            let candidates = self.handle.candidates(problem, &product, WORKSPACE_BYTES as u64)?;
            if candidates.is_empty() {
                continue;
            }
            let chosen = if self.timed {
                timing::fastest(self, problem, &product, &candidates, stream)?
            } else {
                0
            };
            return Ok(Plan { product, algorithm: candidates[chosen] });
        }
        let why = format!("{problem}: cublasLt has no algorithm for it");
        Err(Error::Gpu { action: "plan a product", why })
    }

    /// All plans, also those imported and not used yet.
    pub(super) fn export(&self) -> Vec<u8> {
        let mut pinned = self.imported.clone();
        pinned.extend(self.plans.iter().map(|(problem, plan)| (*problem, plan.algorithm)));
        export::write(&self.identity, &pinned)
    }

    /// Takes over plans for products not seen yet, and returns how many there are.
    pub(super) fn import(&mut self, bytes: &[u8]) -> Result<usize, String> {
        self.imported = export::read(bytes, &self.identity, WORKSPACE_BYTES as u64)?;
        Ok(self.imported.len())
    }
}
