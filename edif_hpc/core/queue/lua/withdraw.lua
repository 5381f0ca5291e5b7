-- End a request from outside: its owner cancels it, or nobody can serve it. Returns 'ended', 'told' (a worker will), 'done' or 'unknown'.
-- ARGV: id, user or '' (an admin), description, retention_ms, only waiting (1 | 0)
local id, user, description, retention, only_waiting = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local f = fields(id, 'state', 'user', 'target', 'priority', 'worker')
if not f[1] or (user ~= '' and f[2] ~= user) then return 'unknown' end
if f[1] == 'done' then return 'done' end
if f[1] == 'waiting' then
  dequeue(id, f[3], f[4], f[2])
  settle(id, now_ms(), 'ERROR', description, '', '', retention)
  return 'ended'
end
if only_waiting == '1' then return 'done' end
redis.call('HSET', k_request(id), 'cancel', description)
redis.call('RPUSH', k_control(f[5]), 'cancel ' .. id .. ' ' .. description)
redis.call('PEXPIRE', k_control(f[5]), 60000)
redis.call('PUBLISH', BELL_WORKERS, f[5])
return 'told'
