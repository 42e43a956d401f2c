//! All integration tests in one binary, one module per capability.

mod backend;
mod cli;
mod corners;
mod docs;
mod evaluation;
mod exports;
mod folders;
mod fusion;
mod generation;
mod inspections;
mod interpreter;
mod layers;
mod metrics;
mod mutations;
mod operators;
mod pictures;
mod properties;
mod refusals;
mod run;
mod schemas;
mod streams;
mod text;
mod training;
mod verify;
mod vision;
mod zoo;
