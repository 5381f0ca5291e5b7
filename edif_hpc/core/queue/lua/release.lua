-- A worker gives a request back. Returns 'queued', 'ended' or 'lost'.
-- ARGV: id, token, reason (handback | walltime | loss), why (without a full stop), attempts, retention_ms
local id, token, reason, why = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local attempts, retention = tonumber(ARGV[5]), tonumber(ARGV[6])
local WALLTIMES = 2  -- a request that two allocations could not finish will not fit a third
local f = fields(id, 'token', 'state')
if f[1] ~= token or f[2] ~= 'claimed' then return 'lost' end
local now = now_ms()
if reason == 'loss' and redis.call('HINCRBY', k_request(id), 'losses', 1) >= attempts then
  bury(id, now, attempts, why, retention)
  return 'ended'
end
if reason == 'walltime' and redis.call('HINCRBY', k_request(id), 'releases', 1) >= WALLTIMES then
  settle(id, now, 'ERROR', 'Given up after ' .. WALLTIMES .. ' allocations ended first: ' .. why .. '.', '', '', retention)
  return 'ended'
end
bump('releases_' .. reason)
give_back(id, now, 'Back in the queue: ' .. why .. '.')
return 'queued'
