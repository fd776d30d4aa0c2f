// Package bench is what the benchmarks below it have in common: runs of a program in a process of its own, with what it
// cost (Measure), figures of several runs (Series), and a report in one form, a table for a person and JSON for whatever
// compares commits.
//
// Numbers in a report are plain numbers, in the unit that ends the name of their field.
package bench
